// Rounding to a format's numbers, see solver/grid.h. Ties go to even, in a table where `above` says.
namespace bitgrain {
namespace BG_ISA {

BG_INLINE F32 round_to_grid(const Grid& grid, F32 x) {
  if (grid.kind == Grid::table) {
    F32 value = set_f(grid.values[0]);
    for (int32_t i = 0; i + 1 < grid.count; ++i) {
      value = select_greater(x, set_f(grid.above[i]), set_f(grid.values[i + 1]), value);
    }
    return value;
  }
  x = min_f(max_f(x, set_f(grid.low)), set_f(grid.high));
  if (grid.kind == Grid::integer) return round_f(x);
  const F32 step = mul_f(max_f(exponent_f(x), set_f(grid.smallest)), set_f(grid.step));
  return mul_f(round_f(div_f(x, step)), step);
}

}  // namespace BG_ISA
}  // namespace bitgrain

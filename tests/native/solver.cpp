// Second moments, GPTQ's loop and range searches: every level against plain scalars.
#include "kernels.h"
#include "numbers.h"
#include "solver/descend.h"
#include "solver/gram.h"
#include "solver/tile_search.h"

using namespace bitgrain;

namespace {

void check_gram(Random& random, const std::string& name) {
  const int64_t tokens = random.one_of<int64_t>({0, 1, 2, 17, 130, 600}), k = random.within(1, 110), stride = k +
      random.within(0, 3);
  const Edge edge = any_edge(random);
  const std::string what = name + ": gram of " + std::to_string(tokens) + " tokens, " + std::to_string(k) + " features";
  Numbers x(tokens ? (tokens - 1) * stride + k : 0, any_float_type(random), edge), h(k * k, DType::f32, edge);
  x.fill(random), h.fill(random);
  std::vector<double> meant, size;
  for (int64_t i = 0; i < k * k; ++i) {
    meant.push_back(h[i]), size.push_back(std::fabs(h[i]));
    for (int64_t t = 0; t < tokens; ++t) {
      const double one = double(x[t * stride + i / k]) * x[t * stride + i % k];
      meant.back() += one, size.back() += std::fabs(one);
    }
  }
  add_gram(x.data(), x.type(), tokens, k, stride, (float*)h.data(), int(random.within(1, 3)));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = i; j < k; ++j) {
      check_near(h[i * k + j], meant[size_t(i * k + j)], 4e-6 * size[size_t(i * k + j)] + 1e-7, what);
    }
  }
  mirror((float*)h.data(), k, int(random.within(1, 3)));
  for (int64_t i = 0; i < k * k; ++i) {
    if (h[i] != h[i % k * k + i / k]) fail(what + ": not mirrored");
  }
}

Grid draw_grid(Random& random) {
  Grid grid{};
  grid.kind = random.one_of({Grid::integer, Grid::floating, Grid::table});
  grid.low = -6.f, grid.high = random.one_of({6.f, 7.f});
  grid.smallest = 1.f, grid.step = 0.5f;  // E2M1
  grid.count = int32_t(random.within(1, 16));
  for (int i = 0; i < grid.count; ++i) grid.values[i] = float(i - 8) * 0.75f;
  for (int i = 0; i + 1 < grid.count; ++i) grid.above[i] = (grid.values[i] + grid.values[i + 1]) / 2;
  return grid;
}

float rounded(const Grid& grid, float x) {
  if (grid.kind == Grid::table) {
    int i = 0;
    while (i + 1 < grid.count && x > grid.above[i]) ++i;
    return grid.values[i];
  }
  x = x < grid.low ? grid.low : x > grid.high ? grid.high : x;
  if (grid.kind == Grid::integer) return std::nearbyint(x);
  const float power = float_of(bits_of(x) & 0x7f800000);
  const float step = (power > grid.smallest ? power : grid.smallest) * grid.step;
  return std::nearbyint(x / step) * step;
}

// All numbers are multiples of 1/16 and small, so that every sum is exact, in whatever order.
// (A scale of 0 leaves the whole weight as an error, which grows from column to column.)
void check_descend(Random& random, const std::string& name) {
  const int64_t columns = random.one_of<int64_t>({1, 7, 8, 33, 300}), lanes = random.within(1, 110);
  const int64_t tables = random.within(1, 3);
  const Edge edge = any_edge(random);
  const std::string what = name + ": descend, " + std::to_string(columns) + " columns of " + std::to_string(lanes) +
      " lanes";
  Guarded<float> panels(ceil_div(lanes, kLanePanel) * columns * kLanePanel, edge, 0xff);
  Guarded<float> factor(columns * columns, edge, 0xff);
  Guarded<float> scale(tables * lanes, edge), divisor(tables * lanes, edge), zero(tables * lanes, edge);
  Guarded<float> numbers(columns * lanes, edge), exact(columns * lanes, edge);
  Guarded<int32_t> tiles(columns, edge);
  Guarded<double> loss(lanes, edge);
  Guarded<uint8_t> kept(columns * lanes, edge);
  std::vector<float> now(size_t(columns * lanes)), errors(now.size()), number(now.size()), turn(now.size());
  std::vector<double> losses(static_cast<size_t>(lanes));
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j < i; ++j) factor[i * columns + j] = random.next() % 8 ? 0.f : float(random.within(-1, 1));
    factor[i * columns + i] = 1.f;
    tiles[i] = int32_t(random.within(0, tables - 1));
  }
  for (int64_t i = 0; i < tables * lanes; ++i) {
    scale[i] = random.one_of({columns < 40 ? 0.f : 1.f, 1.f, 2.f, 4.f}), divisor[i] = scale[i] == 0 ? 1.f : scale[i];
    zero[i] = float(random.within(-2, 2));
  }
  for (size_t i = 0; i < now.size(); ++i) {
    numbers[int64_t(i)] = now[i] = float(random.within(-100, 100)) / 16, kept[int64_t(i)] = random.next() % 8 == 0;
  }
  for (int64_t l = 0; l < lanes; ++l) loss[l] = losses[size_t(l)] = 0.5;
  DescendJob job{columns, lanes, panels.data(), factor.data(), tiles.data(), scale.data(), divisor.data(),
                 random.next() % 2 ? zero.data() : nullptr, {}, numbers.data(), loss.data(),
                 random.next() % 2 ? kept.data() : nullptr, random.next() % 2 ? exact.data() : nullptr};
  job.grid.kind = Grid::integer, job.grid.low = -100, job.grid.high = 100;

  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t l = 0; l < lanes; ++l) {
      const size_t at = size_t(i * lanes + l);
      float x = now[at];
      for (int64_t j = 0; j < i; ++j) x -= factor[i * columns + j] * errors[size_t(j * lanes + l)];
      const int64_t table = tiles[i] * lanes + l;
      turn[at] = x;
      number[at] = rounded(job.grid, x / divisor[table] + (job.zero ? zero[table] : 0.f));
      const float value = (number[at] - (job.zero ? zero[table] : 0.f)) * scale[table];
      errors[at] = job.kept && kept[int64_t(at)] ? 0.f : x - value;
      losses[size_t(l)] += double(errors[at] * errors[at]);
    }
  }
  const int threads = int(random.within(1, 3));
  load_lanes(job, threads);
  if (random.next() % 2) {
    round_columns(job, 0, columns, 0, threads);
  } else {
    for (int64_t first = 0; first < columns;) {
      const int64_t left = columns - first, last = first + (left < 40 ? left : random.within(1, 40));
      update_columns(job, first, last, threads), round_columns(job, first, last, first, threads);
      first = last;
    }
  }
  for (size_t i = 0; i < now.size(); ++i) {
    if (numbers[int64_t(i)] != number[i]) fail(what + ": another number");
    if (job.exact && exact[int64_t(i)] != turn[i]) fail(what + ": another weight at its turn");
  }
  for (int64_t l = 0; l < lanes; ++l) check_near(loss[l], losses[size_t(l)], 1e-9 * losses[size_t(l)], what + ": loss");
}

// Sums of one tile under one candidate: 16 sums side by side, then halves onto each other.
struct Sums {
  double error = 0, wv = 0, wvv = 0, wxv = 0;
};
Sums tile_sums_of(const TileJob& job, int64_t tile, int64_t candidate) {
  double lanes[4][16] = {};
  const float scale = job.scale[candidate * job.tiles + tile];
  const float zero = job.zero ? job.zero[candidate * job.tiles + tile] : 0.f;
  for (int64_t i = 0; i < job.n; ++i) {
    const float x = job.x[tile * job.n + i], w = job.weights ? job.weights[tile * job.n + i] : 1.f;
    const float v = rounded(job.grid, x / (scale == 0 ? 1.f : scale) + zero), wv = w * v, e = (v - zero) * scale - x;
    const float square = e * e, wvv = wv * v, wxv = wv * x, weighted = square * w;
    lanes[0][i % 16] += weighted, lanes[1][i % 16] += wv, lanes[2][i % 16] += wvv, lanes[3][i % 16] += wxv;
  }
  for (auto& one : lanes) {
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) one[i] += one[i + half];
    }
  }
  return {lanes[0][0], lanes[1][0], lanes[2][0], lanes[3][0]};
}

void check_tile_search(Random& random, const std::string& name) {
  const int64_t tiles = random.within(0, 20), n = random.within(1, 70), candidates = random.within(1, 9);
  const Edge edge = any_edge(random);
  const std::string what = name + ": search in " + std::to_string(tiles) + " tiles of " + std::to_string(n);
  Numbers x(tiles * n, DType::f32, edge), weights(tiles * n, DType::f32, edge);
  Guarded<float> scale(candidates * tiles, edge), zero(candidates * tiles, edge);
  Guarded<double> error(tiles, edge), wv(tiles, edge), wvv(tiles, edge), wxv(tiles, edge);
  Guarded<int32_t> best(tiles, edge);
  x.fill(random, 5.f), weights.fill(random);
  for (int64_t i = 0; i < candidates * tiles; ++i) {
    scale[i] = random.next() % 16 ? 0.2f + std::fabs(random.real()) : 0.f, zero[i] = float(random.within(-3, 3));
  }
  TileJob job{(const float*)x.data(), random.next() % 2 ? (const float*)weights.data() : nullptr, tiles, n,
              draw_grid(random), scale.data(), random.next() % 2 ? zero.data() : nullptr, candidates, error.data(),
              nullptr, nullptr, nullptr, best.data()};
  const bool products = random.next() % 2;
  if (products) job.wv = wv.data(), job.wvv = wvv.data(), job.wxv = wxv.data();
  tile_sums(job, int(random.within(1, 3)));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Sums meant = tile_sums_of(job, tile, 0);
    if (error[tile] != meant.error) fail(what + ": another error");
    if (products && (wv[tile] != meant.wv || wvv[tile] != meant.wvv || wxv[tile] != meant.wxv)) {
      fail(what + ": other sums");
    }
    error[tile] = random.next() % 2 ? meant.error : 1e300;
  }
  const std::vector<double> before(error.data(), error.data() + tiles);
  job.wv = job.wvv = job.wxv = nullptr;
  best_candidates(job, int(random.within(1, 3)));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    double least = before[size_t(tile)];
    int32_t which = -1;
    for (int64_t c = 0; c < candidates; ++c) {
      const double one = tile_sums_of(job, tile, c).error;
      if (one < least) least = one, which = int32_t(c);
    }
    if (best[tile] != which || error[tile] != least) fail(what + ": another candidate");
  }
}

}  // namespace

void check_solver(const std::vector<const Kernels*>& levels, uint64_t seed, int64_t rounds) {
  for (const Kernels* level : levels) {
    Random random(seed);
    use_kernels(level->name);
    for (int64_t i = 0; i < 12 + rounds / 2; ++i) {
      check_gram(random, level->name);
      check_descend(random, level->name);
      for (int j = 0; j < 4; ++j) check_tile_search(random, level->name);
    }
  }
}

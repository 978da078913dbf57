// Panels of weights that are looked up in a table against tiles of inputs; see linear/code_linear.h.
namespace bitgrain {
namespace BG_ISA {

constexpr int kBufferSteps = kInputBytes == 2 ? 256 : 64;  // beyond a first-level cache, but fewer rounds over all rows

// Up to job.rows rows of the inputs, as they were arranged.
struct InputTile {
  int64_t rows, row;  // row: the first
  const uint8_t* x;
  const float* sums;    // [spans][rows] or null
  const float* scales;  // of rounded inputs: [spans][rows], [rows] or null
};
BG_INLINE InputTile tile_of(const CodePanelJob& job, int64_t tile) {
  const CodeWeights& w = *job.w;
  const int64_t row = tile * job.rows;
  return {rows_of_tile(job.m, job.rows, tile), row, job.tiles + row * job.row_bytes,
          job.sums ? job.sums + row * w.spans : nullptr,
          job.scales ? job.scales + row * scales_of_row(w) : nullptr};
}

// A chunk of V half panels against R rows, from step I on.
template <int FORM, bool SPLIT, int R, int V, int C, int I = 0, typename T>
BG_INLINE void add_chunk(F32 (&sum)[R][V][C], const I32 (&codes)[V][Looked<FORM>::kVectors], const T& table,
                         const uint8_t* x) {
  Pair pair[V];
  BG_UNROLL for (int v = 0; v < V; ++v) {
    if constexpr (SPLIT) pair[v] = Split<I>::low(codes[v]);
    else pair[v] = Looked<FORM>::template step<I>(codes[v], table);
  }
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v)
      add_product(sum[r][v][I % C], pair[v], x + kPairBytes * r);
  if constexpr (SPLIT) {
    BG_UNROLL for (int v = 0; v < V; ++v) pair[v] = Split<I>::sign(codes[v]);
    BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v)
        add_product(sum[r][v][(I + C / 2) % C], pair[v], x + kPairBytes * r);
  }
  if constexpr (I + 1 < Looked<FORM>::kSteps) {
    add_chunk<FORM, SPLIT, R, V, C, I + 1>(sum, codes, table, x + kPairBytes * R);
  }
}

// R rows against V half panels, from half panel `half` on; weights go from memory to registers.
template <int FORM, int R, int V>
BG_INLINE void code_tile(const CodePanelJob& job, int64_t panel, int half, const InputTile& tile) {
  const CodeWeights& w = *job.w;
  constexpr int kSteps = Looked<FORM>::kSteps, kHalf = Looked<FORM>::kVectors * 64, kChunk = 2 * kHalf;
  constexpr int kChains = R * V <= 2 ? 4 : R * V <= 6 ? 2 : 1;  // sums apart: few rows do not wait for the last product
  const uint8_t* at = w.panels + panel * w.panel_bytes;
  const auto table = Looked<FORM>::load(w);
  const uint8_t* x = tile.x;
  const float* sums = tile.sums;
  const float* scales = w.inputs.groups ? tile.scales : nullptr;  // of each group
  F32 total[R][V];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) total[r][v] = zero_f();

  for (int64_t s = 0; s < w.spans; ++s) {
    F32 sum[R][V][kChains];
    BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v)
        BG_UNROLL for (int c = 0; c < kChains; ++c) sum[r][v][c] = zero_f();
    const uint8_t *header = at, *p = at + code_header_bytes(w.scale_type, w.zeros) + half * kHalf;
    const int64_t chunks = chunks_in<FORM>(w, s);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      I32 codes[V][Looked<FORM>::kVectors];
      load_codes<FORM, V>(p, codes);
      if (R <= 2) BG_UNROLL for (int i = 0; i < V * kHalf / 64; ++i) prefetch(p + 4096 + 64 * i);
      add_chunk<FORM, FORM == 8 && kSplits && R <= 2>(sum, codes, table, x);
      p += kChunk;
      x += kPairBytes * R * kSteps;
    }
    at = p - half * kHalf;
    BG_UNROLL for (int v = 0; v < V; ++v) {
      const GroupScales group = group_scales(w, header, 16 * (half + v));
      BG_UNROLL for (int r = 0; r < R; ++r) {
        F32 whole = sum[r][v][0];
        BG_UNROLL for (int c = 1; c < kChains; ++c) whole = add_f(whole, sum[r][v][c]);
        if (scales) whole = mul_f(whole, set_f(scales[r]));
        total[r][v] = fma_f(whole, group.scale, total[r][v]);
        if (w.zeros != Zeros::constant) total[r][v] = fnma_f(group.shift, set_f(sums[r]), total[r][v]);
      }
    }
    if (sums) sums += R;
    if (scales) scales += R;
  }
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v)
      store_columns(job, tile.row + r, panel * kPanel + 16 * (half + v), total[r][v],
                    tile.scales && !w.inputs.groups ? tile.scales[r] : 1.f);
}

template <int FORM, int R>
static void code_tile_halves(const CodePanelJob& job, int64_t panel, const InputTile& tile) {
  constexpr int V = kGroupedVectors;
  for (int half = 0; half < 2; half += V) code_tile<FORM, R, V>(job, panel, half, tile);
}

template <int FORM, int R = kGroupedRows>
BG_INLINE void code_tile_rows(const CodePanelJob& job, int64_t panel, const InputTile& tile) {
  if (tile.rows == R) code_tile_halves<FORM, R>(job, panel, tile);
  else if constexpr (R > 1) code_tile_rows<FORM, R - 1>(job, panel, tile);
}

// total += scale * sum, of a group or a part of one: sums [rows][16 * vectors], totals [rows][kPanel]. Apart from the
// loop that made them, so that gcc 12 leaves them in registers there.
static __attribute__((noinline)) void add_totals(const float* found, int rows, int vectors, const GroupScales* group,
                                                 const float* sums, const float* scales, float* total) {
  for (int r = 0; r < rows; ++r, total += kPanel) {
    for (int v = 0; v < vectors; ++v, found += 16) {
      F32 sum = load_f(found);
      if (scales) sum = mul_f(sum, set_f(scales[r]));
      sum = fma_f(sum, group[v].scale, load_f(total + 16 * v));
      if (sums) sum = fnma_f(group[v].shift, set_f(sums[r]), sum);
      store_f(total + 16 * v, sum);
    }
  }
}

// Many rows: weights that were unpacked once, [steps][2] vectors, against R rows.
template <int R, int V>
static void add_steps(const uint8_t* weights, const uint8_t* x, int64_t steps, const GroupScales* group,
                      const float* sums, const float* scales, float* total) {
  F32 sum[R][V];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = zero_f();
  for (int64_t i = 0; i < steps; ++i) {
    Pair pair[V];
    BG_UNROLL for (int v = 0; v < V; ++v) pair[v] = load_pair(weights + v * kWeightBytes);
    weights += 2 * kWeightBytes;
    BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v)
        add_product(sum[r][v], pair[v], x + kPairBytes * r);
    x += kPairBytes * R;
  }
  alignas(64) float found[R][16 * V];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) store_f(found[r] + 16 * v, sum[r][v]);
  add_totals(found[0], R, V, group, sums, scales, total);
}

template <int R = kSingleRows>
BG_INLINE void add_steps_rows(int64_t rows, const uint8_t* weights, const uint8_t* x, int64_t steps,
                              const GroupScales* group, const float* sums, const float* scales, float* total) {
  if (rows == R) {
    for (int half = 0; half < 2; half += kSingleVectors) {
      add_steps<R, kSingleVectors>(weights + half * kWeightBytes, x, steps, group + half, sums, scales,
                                   total + 16 * half);
    }
  } else if constexpr (R > 1) {
    add_steps_rows<R - 1>(rows, weights, x, steps, group, sums, scales, total);
  }
}

template <int FORM>
static void code_panel(const CodePanelJob& job, int64_t panel) {
  constexpr int kSteps = Looked<FORM>::kSteps, kHalf = Looked<FORM>::kVectors * 64;
  const CodeWeights& w = *job.w;
  const auto table = Looked<FORM>::load(w);
  const int64_t first_row = job.first_tile * job.rows;
  const int64_t end = job.last_tile * job.rows, rows = (end < job.m ? end : job.m) - first_row;
  for (int64_t i = 0; i < rows * kPanel; i += 16) store_f(job.totals + i, zero_f());

  alignas(64) uint8_t buffer[kBufferSteps * 2 * kWeightBytes];
  const uint8_t* at = w.panels + panel * w.panel_bytes;
  int64_t step = 0;  // of all groups
  for (int64_t s = 0; s < w.spans; ++s) {
    const GroupScales group[2] = {group_scales(w, at, 0), group_scales(w, at, 16)};
    const uint8_t* p = at + code_header_bytes(w.scale_type, w.zeros);
    const int64_t steps = chunks_in<FORM>(w, s) * kSteps;
    for (int64_t i = 0; i < steps; i += kBufferSteps) {
      const int64_t now = steps - i < kBufferSteps ? steps - i : kBufferSteps;
      uint8_t* to = buffer;
      for (int64_t j = 0; j < now; j += kSteps) {
        I32 codes[2][Looked<FORM>::kVectors];
        load_codes<FORM, 2>(p, codes);
        BG_UNROLL for (int k = 0; k < 2 * kHalf / 64; ++k) prefetch(p + 4096 + 64 * k);
        store_chunk<FORM>(codes, table, to);
        p += 2 * kHalf;
        to += 2 * kSteps * kWeightBytes;
      }
      float* total = job.totals;
      for (int64_t tile = job.first_tile; tile < job.last_tile; ++tile) {
        const InputTile in = tile_of(job, tile);
        const bool zeros = w.zeros != Zeros::constant && i == 0;
        add_steps_rows(in.rows, buffer, in.x + step * in.rows * kPairBytes, now, group,
                       zeros ? in.sums + s * in.rows : nullptr, w.inputs.groups ? in.scales + s * in.rows : nullptr,
                       total);
        total += in.rows * kPanel;
      }
      step += now;
    }
    at = p;
  }
  for (int64_t r = 0; r < rows; ++r) BG_UNROLL for (int v = 0; v < 2; ++v)
      store_columns(job, first_row + r, panel * kPanel + 16 * v, load_f(job.totals + r * kPanel + 16 * v),
                    job.scales && !w.inputs.groups ? job.scales[first_row + r] : 1.f);
}

template <int FORM>
static void code_panels_of(const CodePanelJob& job, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    if (job.totals) {
      code_panel<FORM>(job, panel);
      continue;
    }
    for (int64_t tile = job.first_tile; tile < job.last_tile; ++tile) {
      code_tile_rows<FORM>(job, panel, tile_of(job, tile));
    }
  }
}

static void arrange_inputs(const InputJob& job, int64_t first, int64_t last) { arrange_rows<false>(job, first, last); }

static void code_panels(const CodePanelJob& job, int64_t first, int64_t last) {
  switch (job.w->bits) {
    case 8:
      if (job.w->kind == CodeKind::e4m3) return code_panels_of<kE4M3>(job, first, last);
      if (job.w->kind == CodeKind::e5m2) return code_panels_of<kE5M2>(job, first, last);
      return code_panels_of<8>(job, first, last);
    case 4: return code_panels_of<4>(job, first, last);
    case 3: return code_panels_of<3>(job, first, last);
    default: return code_panels_of<2>(job, first, last);
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain

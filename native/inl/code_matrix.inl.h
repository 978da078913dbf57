// Panels of weights that are looked up in a table against tiles of inputs, on the matrix unit; see inl/matrix.inl.h.
//
// A run of up to kMatrixSteps steps of a panel becomes bfloat16 once for all tiles of rows: [steps][16 pairs][2][64].
namespace bitgrain {
namespace BG_ISA {

constexpr int64_t kCodeMatrixRows = 4;  // from so many rows on the unit is faster than registers

// A part of a group in a run of steps.
struct CodePart {
  int64_t group, x_step, steps;
  const uint8_t* weights;
  GroupScales scales[2];
  bool first;  // of the group's parts
};

// total [16][32] += scale * found [2][16][16], and -= shift * sums.
static void add_matrix_group(const float* found, const GroupScales* group, const float* sums, const float* scales,
                             float* total) {
  for (int r = 0; r < kMatrixTile; ++r) {
    BG_UNROLL for (int v = 0; v < 2; ++v) {
      F32 y = load_f(found + (v * 16 + r) * 16);
      if (scales) y = mul_f(y, set_f(scales[r]));
      y = fma_f(y, group[v].scale, load_f(total + r * kPanel + 16 * v));
      if (sums) y = fnma_f(group[v].shift, set_f(sums[r]), y);
      store_f(total + r * kPanel + 16 * v, y);
    }
  }
}

template <int T>
static void multiply_code_parts(const CodePanelJob& job, const CodePart* parts, int count, int64_t tile, float* total) {
  const CodeWeights& w = *job.w;
  const int64_t row = tile * kMatrixTile, x_tile = kMatrixTile * job.row_bytes;
  for (int i = 0; i < count; ++i) {
    const CodePart& part = parts[i];
    alignas(64) float found[T * kMatrixSums];
    multiply_matrix<MatrixKind::bf16, T>(job.tiles + row * job.row_bytes + part.x_step * 1024, x_tile, part.weights,
                                         part.steps, false, found);
    for (int t = 0; t < T; ++t) {
      const int64_t at = (row + t * kMatrixTile) * w.spans + part.group * kMatrixTile;
      const bool zeros = w.zeros != Zeros::constant && part.first;
      add_matrix_group(found + t * kMatrixSums, part.scales, zeros ? job.sums + at : nullptr,
                       w.inputs.groups ? job.scales + at : nullptr, total + t * kMatrixSums);
    }
  }
}

template <int FORM>
static void code_matrix_panel(const CodePanelJob& job, int64_t panel) {
  constexpr int kSteps = Looked<FORM>::kSteps, kHalf = Looked<FORM>::kVectors * 64;
  constexpr int64_t kPairs = 16;  // of features, in a step
  const CodeWeights& w = *job.w;
  const auto table = Looked<FORM>::load(w);
  const int64_t tiles = job.last_tile - job.first_tile;
  for (int64_t i = 0; i < tiles * kMatrixSums; i += 16) store_f(job.totals + i, zero_f());

  alignas(64) uint8_t room[kMatrixSteps * kMatrixStep];
  const uint8_t *header = w.panels + panel * w.panel_bytes, *p = header + code_header_bytes(w.scale_type, w.zeros);
  int64_t done = 0, x_step = 0;
  for (int64_t s = 0; s < w.spans;) {
    CodePart parts[kMatrixSteps];
    int count = 0;
    uint8_t* to = room;
    for (int64_t left = kMatrixSteps; s < w.spans && left > 0;) {
      const int64_t rest = matrix_steps(w, s) - done, now = rest < left ? rest : left;
      if (rest > left && count > 0) break;  // begins in the next run
      parts[count++] = {s, x_step, now, to, {group_scales(w, header, 0), group_scales(w, header, 16)}, done == 0};
      const int64_t chunks_left = chunks_in<FORM>(w, s) - done * kPairs / kSteps, whole = now * kPairs / kSteps;
      for (int64_t c = 0; c < whole; ++c, to += kSteps * 128) {
        if (c >= chunks_left) {  // no number that is not one may meet the zeros there
          std::memset(to, 0, kSteps * 128);
          continue;
        }
        I32 codes[2][Looked<FORM>::kVectors];
        load_codes<FORM, 2>(p, codes);
        BG_UNROLL for (int k = 0; k < 2 * kHalf / 64; ++k) prefetch(p + kAhead + 64 * k);
        store_chunk<FORM>(codes, table, to);
        p += 2 * kHalf;
      }
      done += now, left -= now, x_step += now;
      if (now == rest) header = p, p += code_header_bytes(w.scale_type, w.zeros), ++s, done = 0;
    }
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2) {
      multiply_code_parts<2>(job, parts, count, job.first_tile + t, job.totals + t * kMatrixSums);
    }
    if (t < tiles) multiply_code_parts<1>(job, parts, count, job.first_tile + t, job.totals + t * kMatrixSums);
  }
  const int64_t first_row = job.first_tile * kMatrixTile, end = job.last_tile * kMatrixTile;
  for (int64_t row = first_row; row < (end < job.m ? end : job.m); ++row) BG_UNROLL for (int v = 0; v < 2; ++v)
      store_columns(job, row, panel * kPanel + 16 * v, load_f(job.totals + (row - first_row) * kPanel + 16 * v),
                    job.scales && !w.inputs.groups ? job.scales[row] : 1.f);
}

static void arrange_matrix(const InputJob& job, int64_t first, int64_t last) { arrange_rows<true>(job, first, last); }

static void code_matrix(const CodePanelJob& job, int64_t first, int64_t last) {
  const MatrixUnit unit;
  for (int64_t panel = first; panel < last; ++panel) {
    switch (job.w->bits) {
      case 8:
        if (job.w->kind == CodeKind::integers) code_matrix_panel<8>(job, panel);
        else code_matrix_panel<kE4M3>(job, panel);
        break;
      case 4: code_matrix_panel<4>(job, panel); break;
      case 3: code_matrix_panel<3>(job, panel); break;
      default: code_matrix_panel<2>(job, panel);
    }
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain

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
  bool first, last;  // of the group's parts; of the panel's
};

// Sums of a tile of rows against a group: found [2][16][16]; null, or of the rows [16]: sums of inputs, their scales.
struct FoundGroup {
  const float *found, *sums, *scales;
  const GroupScales* group;
  bool first, last;  // of all parts
};

// total [16][32] = total + scale * found - shift * sums; LAST: that are outputs, of rows `row` on.
template <bool LAST>
static void add_matrix_group(const CodePanelJob& job, const FoundGroup& one, int64_t panel, int64_t row, float* total) {
  const float* before = one.first ? kNoSums : total;
  const int64_t left = job.m - row, rows = LAST && left < kMatrixTile ? left : kMatrixTile;
  for (int64_t r = 0; r < rows; ++r) {
    BG_UNROLL for (int v = 0; v < 2; ++v) {
      F32 y = load_f(one.found + (v * 16 + r) * 16);
      if (one.scales) y = mul_f(y, set_f(one.scales[r]));
      y = fma_f(y, one.group[v].scale, load_f(before + r * kPanel + 16 * v));
      if (one.sums) y = fnma_f(one.group[v].shift, set_f(one.sums[r]), y);
      if (!LAST) store_f(total + r * kPanel + 16 * v, y);
      else store_columns(job, row + r, panel * kPanel + 16 * v, y,
                         job.scales && !job.w->inputs.groups ? job.scales[row + r] : 1.f);
    }
  }
}

template <int T>
static void multiply_code_parts(const CodePanelJob& job, int64_t panel, const CodePart* parts, int count, int64_t tile) {
  const CodeWeights& w = *job.w;
  const int64_t row = tile * kMatrixTile, x_tile = kMatrixTile * job.row_bytes;
  for (int i = 0; i < count; ++i) {
    const CodePart& part = parts[i];
    alignas(64) float found[T * kMatrixSums];
    multiply_matrix<MatrixKind::bf16, T>(job.tiles + row * job.row_bytes + part.x_step * 1024, x_tile, part.weights,
                                         part.steps, false, found);
    for (int t = 0; t < T; ++t) {
      const int64_t at = (row + t * kMatrixTile) * w.spans + part.group * kMatrixTile;
      const float* sums = w.zeros != Zeros::constant && part.first ? job.sums + at : nullptr;
      const FoundGroup one{found + t * kMatrixSums, sums, w.inputs.groups ? job.scales + at : nullptr, part.scales,
                           part.x_step == 0, part.last};
      float* total = job.totals + (tile - job.first_tile + t) * kMatrixSums;
      if (one.last) add_matrix_group<true>(job, one, panel, row + t * kMatrixTile, total);
      else add_matrix_group<false>(job, one, panel, row + t * kMatrixTile, total);
    }
  }
}

template <int FORM>
static void code_matrix_panel(const CodePanelJob& job, int64_t panel) {
  constexpr int kSteps = Looked<FORM>::kSteps, kHalf = Looked<FORM>::kVectors * 64;
  constexpr int64_t kPairs = 16;  // of features, in a step
  const CodeWeights& w = *job.w;
  const auto table = Looked<FORM>::load(w);
  alignas(64) uint8_t room[kMatrixSteps * kMatrixStep];
  const uint8_t *header = w.panels + panel * w.panel_bytes, *p = header + code_header_bytes(w.scale_type, w.zeros);
  int64_t done = 0, x_step = 0;
  for (int64_t s = 0; s < w.spans;) {
    CodePart parts[kMatrixSteps];
    const uint8_t* from = p;
    int count = 0;
    uint8_t* to = room;
    for (int64_t left = kMatrixSteps; s < w.spans && left > 0;) {
      const int64_t rest = matrix_steps(w, s) - done, now = rest < left ? rest : left;
      if (rest > left && count > 0) break;  // begins in the next run
      parts[count++] = {s, x_step, now, to, {group_scales(w, header, 0), group_scales(w, header, 16)}, done == 0,
                        s + 1 == w.spans && now == rest};
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
    Ahead ahead(p, p - from, ceil_div(job.last_tile - job.first_tile, 2));
    int64_t tile = job.first_tile;
    for (; tile + 2 <= job.last_tile; tile += 2) {
      ahead.fetch();
      multiply_code_parts<2>(job, panel, parts, count, tile);
    }
    if (tile < job.last_tile) ahead.fetch(), multiply_code_parts<1>(job, panel, parts, count, tile);
  }
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

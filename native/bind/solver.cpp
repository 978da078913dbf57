#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "bind/bind.h"
#include "solver/descend.h"
#include "solver/gram.h"
#include "solver/tile_search.h"

namespace nb = nanobind;
using namespace bitgrain;

namespace {

Grid make_grid(int kind, float low, float high, float smallest, float step, const std::vector<float>& values,
               const std::vector<float>& above) {
  Grid grid{kind, low, high, smallest, step, static_cast<int32_t>(values.size()), {}, {}};
  std::copy(values.begin(), values.end(), grid.values);
  std::copy(above.begin(), above.end(), grid.above);
  return grid;
}

TileJob make_tiles(uintptr_t x, uintptr_t weights, int64_t tiles, int64_t n, const Grid& grid, uintptr_t scale,
                   uintptr_t zero) {
  TileJob job{};
  job.x = reinterpret_cast<const float*>(x), job.weights = reinterpret_cast<const float*>(weights);
  job.tiles = tiles, job.n = n, job.grid = grid, job.candidates = 1;
  job.scale = reinterpret_cast<const float*>(scale), job.zero = reinterpret_cast<const float*>(zero);
  return job;
}

}  // namespace

void bind_solver(nb::module_& m) {
  m.def("add_gram", [](uintptr_t x, int type, int64_t tokens, int64_t k, int64_t stride, uintptr_t h, int threads) {
    nb::gil_scoped_release free;
    add_gram(reinterpret_cast<const void*>(x), static_cast<DType>(type), tokens, k, stride,
             reinterpret_cast<float*>(h), threads);
  });
  nb::class_<Grid>(m, "Grid").def("__init__", [](Grid* grid, int kind, float low, float high, float smallest, float step,
                                                 const std::vector<float>& values, const std::vector<float>& above) {
    new (grid) Grid(make_grid(kind, low, high, smallest, step, values, above));
  });
  nb::class_<DescendJob>(m, "Descent")
      .def("__init__", [](DescendJob* job, int64_t columns, int64_t lanes, uintptr_t panels, uintptr_t factor,
                          uintptr_t tiles, const Grid& grid, uintptr_t numbers, uintptr_t loss, uintptr_t kept,
                          uintptr_t exact) {
        new (job) DescendJob{columns, lanes, reinterpret_cast<float*>(panels), reinterpret_cast<const float*>(factor),
                             reinterpret_cast<const int32_t*>(tiles), nullptr, nullptr, nullptr, grid,
                             reinterpret_cast<float*>(numbers), reinterpret_cast<double*>(loss),
                             reinterpret_cast<const uint8_t*>(kept), reinterpret_cast<float*>(exact)};
      })
      .def("set_tables", [](DescendJob& job, uintptr_t scale, uintptr_t divisor, uintptr_t zero) {
        job.scale = reinterpret_cast<const float*>(scale);
        job.divisor = reinterpret_cast<const float*>(divisor);
        job.zero = reinterpret_cast<const float*>(zero);
      })
      .def("load", [](const DescendJob& job, int threads) {
        nb::gil_scoped_release free;
        load_lanes(job, threads);
      })
      .def("update", [](const DescendJob& job, int64_t first, int64_t last, int threads) {
        nb::gil_scoped_release free;
        update_columns(job, first, last, threads);
      })
      .def("round", [](const DescendJob& job, int64_t first, int64_t last, int64_t seen, int threads) {
        nb::gil_scoped_release free;
        round_columns(job, first, last, seen, threads);
      });
  m.def("tile_sums", [](uintptr_t x, uintptr_t weights, int64_t tiles, int64_t n, const Grid& grid, uintptr_t scale,
                        uintptr_t zero, uintptr_t sums, bool products, int threads) {
    TileJob job = make_tiles(x, weights, tiles, n, grid, scale, zero);
    job.error = reinterpret_cast<double*>(sums);
    if (products) job.wv = job.error + tiles, job.wvv = job.wv + tiles, job.wxv = job.wvv + tiles;
    nb::gil_scoped_release free;
    tile_sums(job, threads);
  });
  m.def("best_candidates", [](uintptr_t x, uintptr_t weights, int64_t tiles, int64_t n, const Grid& grid, uintptr_t scale,
                              uintptr_t zero, int64_t candidates, uintptr_t error, uintptr_t best, int threads) {
    TileJob job = make_tiles(x, weights, tiles, n, grid, scale, zero);
    job.candidates = candidates;
    job.error = reinterpret_cast<double*>(error), job.best = reinterpret_cast<int32_t*>(best);
    nb::gil_scoped_release free;
    best_candidates(job, threads);
  });
  m.def("mirror", [](uintptr_t h, int64_t k, int threads) {
    nb::gil_scoped_release free;
    mirror(reinterpret_cast<float*>(h), k, threads);
  });
}

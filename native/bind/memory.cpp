#include <nanobind/nanobind.h>
#include <sys/mman.h>

#include "bind/bind.h"

namespace nb = nanobind;

namespace {

// The large pages that lie whole in this memory. Advice: where it is not followed, pages stay as they are.
void advise(uintptr_t memory, size_t bytes, int advice) {
  const uintptr_t page = 2 << 20, first = (memory + page - 1) / page * page, last = (memory + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, advice);
}

}  // namespace

void bind_memory(nb::module_& m) {
  m.def("use_huge_pages", [](uintptr_t memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    advise(memory, bytes, MADV_HUGEPAGE);
#endif
  }, "Ask for large pages inside this memory, which nothing was written to yet.");
  m.def("move_to_huge_pages", [](uintptr_t memory, size_t bytes) {
    nb::gil_scoped_release free;
#ifdef MADV_HUGEPAGE
    constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers do not name
    advise(memory, bytes, MADV_HUGEPAGE);
    advise(memory, bytes, kCollapse);
#endif
  }, "The same for memory that is in use: what it holds is moved, and stays where it is for the program.");
}

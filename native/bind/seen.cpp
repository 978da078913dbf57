// Whether dictionaries of Python still hold what they held: asked before a native call stands for many modules.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bind/bind.h"

namespace nb = nanobind;

namespace {

constexpr size_t kAhead = 16;  // entries

class Seen {
 public:
  using Entry = std::tuple<nb::dict, nb::str, nb::object>;  // a dictionary, a key, its value; None: the key is absent

  explicit Seen(std::vector<Entry> entries) : entries_(std::move(entries)) {}

  // the very same objects
  bool hold() const {
    const size_t count = entries_.size();
    for (size_t i = 0; i < count; ++i) {
      // they lie anywhere, and weights have driven them out of the caches
      if (i + kAhead < count) __builtin_prefetch(std::get<0>(entries_[i + kAhead]).ptr());
      if (i + kAhead / 2 < count) {
        __builtin_prefetch(reinterpret_cast<PyDictObject*>(std::get<0>(entries_[i + kAhead / 2]).ptr())->ma_keys);
      }
      const auto& [owner, key, value] = entries_[i];
      PyObject* now = PyDict_GetItemWithError(owner.ptr(), key.ptr());
      if (now != value.ptr() && (now != nullptr || !value.is_none())) {
        if (PyErr_Occurred()) throw nb::python_error();
        return false;
      }
    }
    return true;
  }

  // so that what it holds is freed with it, although that may lead back here
  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!nb::inst_ready(self)) return 0;
    for (const auto& [owner, key, value] : nb::inst_ptr<Seen>(self)->entries_) {
      Py_VISIT(owner.ptr());
      Py_VISIT(value.ptr());
    }
    return 0;
  }

  static int clear(PyObject* self) {
    std::vector<Entry> gone = std::move(nb::inst_ptr<Seen>(self)->entries_);
    return 0;
  }

 private:
  std::vector<Entry> entries_;
};

PyType_Slot kSlots[] = {{Py_tp_traverse, (void*)Seen::traverse}, {Py_tp_clear, (void*)Seen::clear}, {0, nullptr}};

}  // namespace

void bind_seen(nb::module_& m) {
  nb::class_<Seen>(m, "Seen", nb::type_slots(kSlots)).def(nb::init<std::vector<Seen::Entry>>()).def("hold", &Seen::hold);
}

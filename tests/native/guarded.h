// Memory that ends (or starts) at a page that nobody may touch: one byte too far and the process dies.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

enum class Edge { end, start };

template <typename T>
class Guarded {
 public:
  // count elements, all bytes `fill`
  Guarded(int64_t count, Edge edge, uint8_t fill = 0) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), inner = (bytes_ + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    void* made = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED || (inner && mprotect(static_cast<uint8_t*>(made) + page, inner, PROT_READ | PROT_WRITE))) {
      std::perror("guarded memory");
      std::exit(2);
    }
    map_ = static_cast<uint8_t*>(made);
    at_ = map_ + page + (edge == Edge::end ? inner - bytes_ : 0);
    if (bytes_) std::memset(at_, fill, bytes_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(map_, mapped_); }

  T* data() { return reinterpret_cast<T*>(at_); }
  T& operator[](int64_t i) { return data()[i]; }
  uint8_t* bytes() { return at_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_, mapped_;
  uint8_t *map_, *at_;
};

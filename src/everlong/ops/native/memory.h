// Where memory is short, a kernel says so. An exception that leaves a parallel region would end the process.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>

namespace ev {

enum Status : int64_t { DONE = 0, NO_MEMORY = 1, OUTSIDE = 2 };  // as in __init__.py

// What a parallel region allocates, it does within `attempt`: after a failure nothing more is attempted, and behind the
// region `check` throws.
class Attempts {
  std::atomic<bool> failed{false};

 public:
  template <class F>
  void attempt(F f) {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      f();
    } catch (const std::exception &) {
      failed.store(true, std::memory_order_relaxed);
    }
  }
  void check() const {
    if (failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }
};

// What an entry point returns.
template <class F>
int64_t status(F f) {
  try {
    f();
    return DONE;
  } catch (const std::exception &) {
    return NO_MEMORY;
  }
}

}  // namespace ev

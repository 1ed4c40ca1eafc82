// A team of threads that do nothing, for waiting.py.

#include <cstdint>

extern "C" {

// Opens one region of `threads` threads. OpenMP keeps the team, asleep, for as long as the calling thread lives.
int64_t ev_waiting_team(int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    asm volatile("");  // or the region is left out
  }
  return 0;
}

}  // extern "C"

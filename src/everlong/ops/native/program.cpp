// A recorded program of one token: instructions over buffers that stay where they are, replayed by one call.
//
// All threads walk the same list. A small instruction is done by thread 0 alone, a large one by all; the threads meet
// at a barrier before an instruction that needs what others have done since they last met (program.py finds these), so
// that a run of small ones costs no meeting at all, nor do products of one input. What the
// instructions do stands in the files of their ops, which register them (instruction.h).
#include <sched.h>

#include <atomic>
#include <vector>

#include "instruction.h"

#if defined(_OPENMP)
extern "C" int omp_get_num_threads();
#else
inline int omp_get_num_threads() { return 1; }
#endif

using namespace ev;

namespace {

enum Flags : int64_t { SHARED = 1, MEETS = 2 };  // as in program.py

std::vector<InstructionKind> &kinds() {  // made on first use: the files that register come in any order
  static std::vector<InstructionKind> all;
  return all;
}

// Sense-reversing barrier; gives the core away where the others take long. A thread that waits does `meanwhile`.
struct Barrier {
  std::atomic<int64_t> waiting{0}, round{0};
  template <class F>
  void meet(int64_t threads, F meanwhile) {
    if (threads == 1) return;
    const int64_t mine = round.load(std::memory_order_acquire);
    if (waiting.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      waiting.store(0, std::memory_order_relaxed);
      round.store(mine + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == mine; spins++) {
      if (meanwhile()) continue;
      if (spins > 4000) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
};

// The weights that a thread will read next, fetched while it would else wait: memory is what decoding lacks.
struct Fetch {
  static constexpr int64_t MOST = 256 << 10, PIECE = 4 * 64;  // bytes: of one matrix, of one call
  const char *from = nullptr, *to = nullptr;
  void begin(Bytes bytes) {
    from = bytes.from;
    to = bytes.to - bytes.from > MOST ? bytes.from + MOST : bytes.to;
  }
  bool piece() {
    if (from >= to) return false;
    for (int64_t at = 0; at < PIECE; at += 64) __builtin_prefetch(from + at, 0, 2);
    from += PIECE;
    return true;
  }
};

}  // namespace

ev::Register::Register(const char *name, Perform perform, Reads reads) { kinds().push_back({name, perform, reads}); }

extern "C" {

int64_t ev_program_instruction_bytes() { return sizeof(Instruction); }

int64_t ev_program_kinds() { return int64_t(kinds().size()); }

const char *ev_program_kind(int64_t code) { return kinds()[code].name; }

// `tokens` has `rows` ids. Returns 0: nothing here asks for memory.
int64_t ev_program_run(const Instruction *program, int64_t length, const int64_t *tokens, int64_t rows, int64_t threads) {
  Barrier barrier;
  const InstructionKind *kind = kinds().data();
#pragma omp parallel num_threads(threads)
  {
    const int64_t id = omp_get_thread_num(), threads = omp_get_num_threads();  // as many as were really given
    Fetch next;
    const auto fetch_after = [&](int64_t i) {  // the thread's part of the first weights behind instruction i
      do i++;
      while (i < length && !kind[program[i].code].reads);
      if (i == length || !(program[i].shared & SHARED || id == 0)) return;
      next.begin(kind[program[i].code].reads(program[i], program[i].shared & SHARED ? Share{id, threads} : Share{0, 1}));
    };
    fetch_after(-1);
    for (int64_t i = 0; i < length; i++) {
      const bool shared = program[i].shared & SHARED;
      if (shared || id == 0) kind[program[i].code].perform(program[i], shared ? Share{id, threads} : Share{0, 1}, tokens);
      if (kind[program[i].code].reads) fetch_after(i);
      if (i + 1 < length && (program[i + 1].shared & MEETS)) barrier.meet(threads, [&] { return next.piece(); });
    }
  }
  return 0;
}

}  // extern "C"

// What a program is made of: instructions on tensors of floats, each of a kind that the file of its op registers by name.
//
//   void attend(const Instruction &i, Share share, const int64_t *tokens) { ... }
//   const Register attend_kind("attend", attend);
//
// What sizes, numbers and inputs mean is the kind's own matter. A function does its `share` of the work; where the
// instruction is not shared, that is all of it.
#pragma once
#include <type_traits>

#include "vec.h"

namespace ev {

// A tensor of floats: its first number and the distances between neighbours along its axes.
struct Ref {
  float *at;
  int64_t stride[4];
};

// The same as load and store with a distance between the lanes; rare cases stay out of line, or compiling takes long.
__attribute__((noinline)) static vf load_rare(const float *p, int64_t stride, int n) {
  if (stride == 1) return load(p, n);
  vf v{};
  for (int i = 0; i < n; i++) v[i] = p[i * stride];
  return v;
}
inline vf load(const float *p, int64_t stride, int n) {
  if (stride == 1 && n == W) return load(p);
  return stride == 0 ? splat(*p) : load_rare(p, stride, n);
}
__attribute__((noinline)) static void store_rare(float *p, int64_t stride, vf v, int n) {
  if (stride == 1) return store(p, v, n);
  for (int i = 0; i < n; i++) p[i * stride] = v[i];
}
inline void store(float *p, int64_t stride, vf v, int n) {
  if (stride == 1 && n == W) return store(p, v);
  store_rare(p, stride, v, n);
}

inline int lanes(int64_t left) { return left < W ? int(left) : W; }

constexpr int INPUTS = 7;

// The same layout as `_CInstruction` in program.py.
struct Instruction {
  int64_t code, shared;
  int64_t size[4];
  Ref out, in[INPUTS];
  int64_t number[4];
  double scalar[2];
  const void *raw[2];
};

// Part `id` of `count`.
struct Share {
  int64_t id, count;
  int64_t begin(int64_t n) const { return n * id / count; }
  int64_t end(int64_t n) const { return n * (id + 1) / count; }
};

struct Bytes {
  const char *from, *to;
};

using Perform = void (*)(const Instruction &, Share, const int64_t *tokens);
using Reads = Bytes (*)(const Instruction &, Share);  // what an instruction will read, for who can fetch it early

struct InstructionKind {
  const char *name;
  Perform perform;
  Reads reads;
};

// Adds a kind when the library is loaded; `code` is its place among all.
struct Register {
  Register(const char *name, Perform perform, Reads reads = nullptr);
};

// Channels of all rows, in runs of 16 so that no two threads write to one line of memory: f(row, begin, end).
template <class F>
void channel_runs(int64_t batch, int64_t channels, Share share, F f) {
  const int64_t runs = (channels + 15) / 16, all = batch * runs;
  for (int64_t task = share.begin(all); task < share.end(all);) {
    const int64_t b = task / runs, first = task % runs;
    const int64_t last = first + share.end(all) - task < runs ? first + share.end(all) - task : runs;
    f(b, first * 16, last * 16 < channels ? last * 16 : channels);
    task += last - first;
  }
}

}  // namespace ev

// Diagonal linear recurrence:  h_t = exp(g_t) h_{t-1} + b_t  per channel, real or complex.
//
// Rows of channels are the inner loop, so memory is read once and in order; h of the row before stays in the cache.
// Complex numbers are pairs of neighbouring lanes. The backward pass is the same walk from the right over the h that
// the forward pass has given:  l_t = gy_t + conj(exp g_{t+1}) l_{t+1},  gb = l,  gg_t = l_t conj(exp(g_t) h_{t-1}).
#include <vector>

#include "memory.h"
#include "vec.h"

using namespace ev;

namespace {

enum Kind { REAL, PAIRED, COMPLEX };  // both real; h complex, g real; both complex

constexpr int64_t BLOCK = 4096;  // numbers of one task, at most

struct Shape {
  int64_t batch, time, width;  // real numbers per token: twice the channels of a complex h
  bool fixed;                  // g is [C], the same for all tokens
};

// exp(g) as h = real * h + imag * swapped(h), for the n lanes at c; g is the row of a token.
template <int KIND, class T>
inline void decay(const T *g, int64_t c, int n, vf &real, vf &imag) {
  if (KIND == REAL) {
    real = ev::exp(load(g + c, n));
  } else if (KIND == PAIRED) {
    real = ev::exp(twice(load(g + c / 2, n / 2)));
  } else {
    const vf both = load(g + c, n), size = ev::exp(firsts(both));
    vf sine, cosine;
    sin_cos(seconds(both), sine, cosine);
    real = size * cosine;
    imag = size * sine * alternating();
  }
}

template <int KIND>
inline vf times(vf real, vf imag, vf h) {
  return KIND == COMPLEX ? real * h + imag * swapped(h) : real * h;
}
template <int KIND>
inline vf conjugate_times(vf real, vf imag, vf h) {
  return KIND == COMPLEX ? real * h - imag * swapped(h) : real * h;
}
// The gradient of g from that of h, l, and p = exp(g) h_{t-1}; for PAIRED the same number in both lanes.
template <int KIND>
inline vf slope(vf l, vf p) {
  if (KIND == REAL) return l * p;
  const vf direct = l * p, real = direct + swapped(direct);
  if (KIND == PAIRED) return real;
  const vf crossed = l * swapped(p);
  return select(alternating() < 0.0f, real, crossed - swapped(crossed));
}
template <int KIND, class T>
inline void store_slope(T *row, int64_t c, int n, vf v) {
  if (KIND != PAIRED) return store(row + c, v, n);
  store(row + c / 2, once(v), n / 2);
}

// run(c, n) for the lanes from begin to end: whole vectors first, so that their loop knows n.
template <class F>
inline void lanes(int64_t begin, int64_t end, F run) {
  int64_t c = begin;
  for (; c + W <= end; c += W) run(c, W);
  if (c < end) run(c, int(end - c));
}

template <class T, int KIND>
struct Scan {
  Shape s;
  const T *b, *g;
  const float *state;     // [B N]
  const uint8_t *starts;  // [B T] or null
  static constexpr int64_t RATIO = KIND == PAIRED ? 2 : 1;  // lanes of h per number of g

  const T *g_row(int64_t at) const { return s.fixed ? g : g + at * (s.width / RATIO); }
  bool first(int64_t at) const { return starts && starts[at]; }

  // The decays of all tokens at once, where they are the same: real parts, then imaginary ones.
  std::vector<float> constant(int64_t c0, int64_t c1) const {
    std::vector<float> e(s.fixed ? 2 * (c1 - c0) : 0);
    if (s.fixed)
      lanes(c0, c1, [&](int64_t c, int n) EV_BOTH {
        vf real{}, imag{};
        decay<KIND>(g, c, n, real, imag);
        store(&e[c - c0], real, n);
        store(&e[c - c0] + (c1 - c0), imag, n);
      });
    return e;
  }
  inline void decay_of(const T *row, const float *e, int64_t c0, int64_t c1, int64_t c, int n, vf &real,
                       vf &imag) const {
    if (!s.fixed) return decay<KIND>(row, c, n, real, imag);
    real = load(e + c - c0, n);
    if (KIND == COMPLEX) imag = load(e + c - c0 + (c1 - c0), n);
  }

  void forward(int64_t b_row, int64_t c0, int64_t c1, T *y, float *final_state, float *kept) const {
    const std::vector<float> constants = constant(c0, c1);
    const float *e = constants.data();
    std::vector<float> before(state + b_row * s.width + c0, state + b_row * s.width + c1);
    float *h = before.data();
    for (int64_t t = 0; t < s.time; t++) {
      const int64_t at = b_row * s.time + t, row = at * s.width;
      const T *gs = g_row(at), *in = b + row;
      T *out = y + row;
      if (first(at)) std::memset(h, 0, (c1 - c0) * sizeof(float));
      lanes(c0, c1, [&](int64_t c, int n) EV_BOTH {
        vf real{}, imag{};
        decay_of(gs, e, c0, c1, c, n, real, imag);
        __builtin_prefetch(in + s.width + c);
        __builtin_prefetch(out + s.width + c, 1);
        if (!s.fixed) __builtin_prefetch(gs + (s.width + c) / RATIO);
        const vf now = times<KIND>(real, imag, load(h + c - c0, n)) + load(in + c, n);
        store(h + c - c0, now, n);
        store(out + c, now, n);
        if (kept) store(kept + row + c, now, n);
      });
    }
    std::memcpy(final_state + b_row * s.width + c0, h, (c1 - c0) * sizeof(float));
  }

  // h is that of all tokens, gfinal null where the final state has no gradient; gg [B T ..] or, fixed, sums [B ..].
  template <class Gg>
  void backward(int64_t b_row, int64_t c0, int64_t c1, const float *h, const T *gy, const float *gfinal, T *gb, Gg *gg,
                float *gstate) const {
    const std::vector<float> constants = constant(c0, c1);
    const float *e = constants.data();
    std::vector<float> after(c1 - c0), total(c1 - c0);
    float *carried = after.data(), *sums = total.data();
    if (gfinal) std::memcpy(carried, gfinal + b_row * s.width + c0, (c1 - c0) * sizeof(float));
    for (int64_t t = s.time - 1; t >= 0; t--) {
      const int64_t at = b_row * s.time + t, row = at * s.width;
      const T *gs = g_row(at), *from = gy + row;
      const float *before = t ? h + row - s.width : state + b_row * s.width;
      T *out = gb + row;
      Gg *slopes = gg + row / RATIO;
      const bool begins = first(at);
      lanes(c0, c1, [&](int64_t c, int n) EV_BOTH {
        vf real{}, imag{};
        if (!begins) decay_of(gs, e, c0, c1, c, n, real, imag);
        __builtin_prefetch(from - s.width + c);
        __builtin_prefetch(before - s.width + c);
        __builtin_prefetch(out - s.width + c, 1);
        if (!s.fixed) __builtin_prefetch(gs - (s.width - c) / RATIO);
        const vf l = load(from + c, n) + load(carried + c - c0, n);
        store(out + c, l, n);
        store(carried + c - c0, conjugate_times<KIND>(real, imag, l), n);
        const vf d = slope<KIND>(l, times<KIND>(real, imag, load(before + c, n)));
        if (s.fixed)
          store(sums + c - c0, load(sums + c - c0, n) + d, n);
        else
          store_slope<KIND>(slopes, c, n, d);
      });
    }
    std::memcpy(gstate + b_row * s.width + c0, carried, (c1 - c0) * sizeof(float));
    if (s.fixed)
      lanes(c0, c1, [&](int64_t c, int n) EV_BOTH {
        store_slope<KIND>(gg + b_row * (s.width / RATIO), c, n, load(sums + c - c0, n));
      });
  }
};

// run(row, c0, c1) over rows and blocks of lanes, at least one task per thread where there are lanes enough.
template <class F>
void tasks(const Shape s, int64_t threads, F run) {
  if (!s.batch || !s.width) return;
  int64_t blocks = (threads + s.batch - 1) / s.batch;
  if (blocks < (s.width + BLOCK - 1) / BLOCK) blocks = (s.width + BLOCK - 1) / BLOCK;
  const int64_t size = ((s.width + blocks - 1) / blocks + W - 1) / W * W;
  blocks = (s.width + size - 1) / size;
  Attempts memory;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t b = 0; b < s.batch; b++)
    for (int64_t i = 0; i < blocks; i++)
      memory.attempt([&] { run(b, i * size, (i + 1) * size < s.width ? (i + 1) * size : s.width); });
  memory.check();
}

template <class T, int KIND>
void forward(const Shape s, const void *b, const void *g, const float *state, const uint8_t *starts, void *y,
             float *final_state, float *kept, int64_t threads) {
  const Scan<T, KIND> scan{s, (const T *)b, (const T *)g, state, starts};
  tasks(s, threads, [&](int64_t row, int64_t c0, int64_t c1) {
    scan.forward(row, c0, c1, (T *)y, final_state, kept);
  });
}

template <class T, int KIND>
void backward(const Shape s, const void *g, const float *state, const uint8_t *starts, const float *h, const void *gy,
              const float *gfinal, void *gb, void *gg, float *gstate, int64_t threads) {
  const Scan<T, KIND> scan{s, nullptr, (const T *)g, state, starts};
  tasks(s, threads, [&](int64_t row, int64_t c0, int64_t c1) {
    if (s.fixed)
      scan.backward(row, c0, c1, h, (const T *)gy, gfinal, (T *)gb, (float *)gg, gstate);
    else
      scan.backward(row, c0, c1, h, (const T *)gy, gfinal, (T *)gb, (T *)gg, gstate);
  });
}

}  // namespace

extern "C" {

int64_t ev_diagonal_scan(int64_t half, int64_t kind, int64_t fixed, int64_t batch, int64_t time, int64_t width,
                      const void *b, const void *g, const float *state, const uint8_t *starts, void *y,
                      float *final_state, float *kept, int64_t threads) {
  return status([&] {
    auto run = kind == COMPLEX  ? forward<float, COMPLEX>
               : kind == PAIRED ? forward<float, PAIRED>
               : half           ? forward<bf16, REAL>
                                : forward<float, REAL>;
    run({batch, time, width, fixed != 0}, b, g, state, starts, y, final_state, kept, threads);
  });
}

int64_t ev_diagonal_scan_backward(int64_t half, int64_t kind, int64_t fixed, int64_t batch, int64_t time, int64_t width,
                               const void *g, const float *state, const uint8_t *starts, const float *h,
                               const void *gy, const float *gfinal, void *gb, void *gg, float *gstate,
                               int64_t threads) {
  return status([&] {
    auto run = kind == COMPLEX  ? backward<float, COMPLEX>
               : kind == PAIRED ? backward<float, PAIRED>
               : half           ? backward<bf16, REAL>
                                : backward<float, REAL>;
    run({batch, time, width, fixed != 0}, g, state, starts, h, gy, gfinal, gb, gg, gstate, threads);
  });
}

}  // extern "C"

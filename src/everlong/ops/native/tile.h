// What the kernels of matrix-valued states share: working memory, rows in and out, products of matrices that lie in
// the first cache, transposes. Every working matrix has rows of a multiple of LANES floats, zero where padded.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "memory.h"
#include "vec.h"

#define EV_INLINE inline __attribute__((always_inline))

namespace ev {

constexpr int64_t LANES = 16;  // a multiple of W in every build
inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Zeroed floats, aligned to a cache line.
class Buffer {
  struct alignas(64) Line {
    float x[LANES];
  };
  std::vector<Line> lines;

 public:
  explicit Buffer(int64_t floats = 0) : lines(blocks(floats, LANES)) {}
  operator float *() { return (float *)lines.data(); }
  operator const float *() const { return (const float *)lines.data(); }
};

// While it lives, results below 1e-38 are zero: numbers that a decay has made that small cost 100 cycles each.
class FlushTiny {
#if defined(__SSE__)
  unsigned saved = __builtin_ia32_stmxcsr();

 public:
  FlushTiny() { __builtin_ia32_ldmxcsr(saved | 0x8040); }
  ~FlushTiny() { __builtin_ia32_ldmxcsr(saved); }
#else
 public:
  FlushTiny() {}
#endif
};

// n rows of `width` numbers in memory, `stride` apart. What lies `ahead` rows away is wanted soon.
template <class T>
struct Rows {
  T *at;
  int64_t stride, n, width, ahead;
};

// As rows of padded(width) floats, up to row `rows` of them zero. `change(x, i, c)` is what is stored of the
// vector x at row i, column c.
template <class T, class F>
EV_INLINE void read(Rows<T> from, float *to, int64_t rows, F &&change) {
  const int64_t ld = padded(from.width), whole = from.width / W * W;
  const int rest = int(from.width - whole);
  for (int64_t i = 0; i < from.n; i++) {
    T *row = from.at + i * from.stride;
    if (from.ahead)
      for (int64_t c = 0; c < ld; c += LANES) __builtin_prefetch(row + from.ahead * from.stride + c, 0, 2);
    for (int64_t c = 0; c < whole; c += W) store(to + i * ld + c, change(load(row + c), i, c));
    if (rest) store(to + i * ld + whole, change(load(row + whole, rest), i, whole));
    for (int64_t c = whole + (rest ? W : 0); c < ld; c += W) store(to + i * ld + c, vf{});
  }
  std::fill(to + from.n * ld, to + std::max(from.n, rows) * ld, 0.0f);
}
template <class T>
inline void read(Rows<T> from, float *to, int64_t rows) {
  read(from, to, rows, [](vf x, int64_t, int64_t) { return x; });
}

// The rows of padded(width) floats that `change(x, i, c)` makes of those at `from`.
template <class T, class F>
EV_INLINE void write(const float *from, Rows<T> to, F &&change) {
  const int64_t ld = padded(to.width), whole = to.width / W * W;
  const int rest = int(to.width - whole);
  for (int64_t i = 0; i < to.n; i++) {
    T *row = to.at + i * to.stride;
    for (int64_t c = 0; c < whole; c += W) store(row + c, change(load(from + i * ld + c), row + c, W));
    if (rest) store(row + whole, change(load(from + i * ld + whole), row + whole, rest), rest);
  }
}
template <class T>
inline void write(const float *from, Rows<T> to) {
  write(from, to, [](vf x, T *, int) { return x; });
}
// The scalars a(i, d) = p[i * row + d * col] of a product: a matrix, or its transpose.
struct Scalars {
  const float *p;
  int64_t row, col;
};

// R rows of N vectors in registers.
template <int R, int N>
struct Tile {
  static constexpr int rows = R, vectors = N;
  vf x[R][N];

  // += a(i, d) b(d, .) for d below depth
  EV_INLINE void add(Scalars a, int64_t depth, const float *b, int64_t ld) {
    for (int64_t d = 0; d < depth; d++) {
      vf row[N];
      for (int n = 0; n < N; n++) row[n] = ev::load(b + d * ld + n * W);
      for (int i = 0; i < R; i++) {
        const float s = a.p[i * a.row + d * a.col];
        for (int n = 0; n < N; n++) x[i][n] += row[n] * s;
      }
    }
  }
  EV_INLINE void load(const float *p, int64_t ld) {
    for (int i = 0; i < R; i++)
      for (int n = 0; n < N; n++) x[i][n] = ev::load(p + i * ld + n * W);
  }
  EV_INLINE void store(float *p, int64_t ld) const {
    for (int i = 0; i < R; i++)
      for (int n = 0; n < N; n++) ev::store(p + i * ld + n * W, x[i][n]);
  }
};

template <int R, int N>
struct Kind {
  EV_INLINE Tile<R, N> zeros() const { return Tile<R, N>{}; }
};

// Calls each(kind, i, c) for tiles that cover rows (rounded up to 4) and columns (a multiple of LANES).
template <class F>
EV_INLINE void tiles(int64_t rows, int64_t columns, F &&each) {
  constexpr int N = W == 16 ? 4 : 2;
  int64_t c = 0;
  for (; c + N * W <= columns; c += N * W)
    for (int64_t i = 0; i < rows; i += 4) each(Kind<4, N>{}, i, c);
  for (; c < columns; c += W) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) each(Kind<8, 1>{}, i, c);
    for (; i < rows; i += 4) each(Kind<4, 1>{}, i, c);
  }
}

// out [rows columns] = a b, over `depth`; out has rows of `ld`
inline void product(int64_t rows, int64_t columns, Scalars a, int64_t depth, const float *b, float *out, int64_t ld) {
  tiles(rows, columns, [&](auto kind, int64_t i, int64_t c) {
    auto t = kind.zeros();
    t.add({a.p + i * a.row, a.row, a.col}, depth, b + c, columns);
    t.store(out + i * ld + c, ld);
  });
}

// Lanes l of a and b with l & S clear go to a, the others to b.
template <int S>
EV_INLINE void exchange(vf &a, vf &b) {
  vf low, high;
#if defined(__clang__)
  for (int l = 0; l < W; l++) {
    low[l] = l & S ? b[l - S] : a[l];
    high[l] = l & S ? b[l] : a[l + S];
  }
#else
  vi from_low, from_high;
  for (int l = 0; l < W; l++) {
    from_low[l] = l & S ? W + l - S : l;
    from_high[l] = l & S ? W + l : l + S;
  }
  low = __builtin_shuffle(a, b, from_low);
  high = __builtin_shuffle(a, b, from_high);
#endif
  a = low;
  b = high;
}

template <int S>
EV_INLINE void transpose_step(vf *x) {
  if constexpr (S < W) {
    for (int i = 0; i < W; i++)
      if (!(i & S)) exchange<S>(x[i], x[i + S]);
    transpose_step<2 * S>(x);
  }
}

// out[c][r] = in[r][c] for rows and columns that are multiples of LANES; in has rows of `ld`
inline void transpose(const float *in, int64_t rows, int64_t columns, int64_t ld, float *out) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < columns; c += W) {
      vf x[W];
      for (int i = 0; i < W; i++) x[i] = load(in + (r + i) * ld + c);
      transpose_step<1>(x);
      for (int i = 0; i < W; i++) store(out + (c + i) * rows + r, x[i]);
    }
}
inline void transpose(const float *in, int64_t rows, int64_t columns, float *out) {
  transpose(in, rows, columns, columns, out);
}

template <int S>
EV_INLINE void sum_step(vf *x) {
  if constexpr (S < W) {
    for (int i = 0; i < W; i++)
      if (!(i & (2 * S - 1))) {
        exchange<S>(x[i], x[i + S]);
        x[i] += x[i + S];
      }
    sum_step<2 * S>(x);
  }
}

// out[i] = the sum of the lanes of x[i], for n (a multiple of W) vectors
inline void sum_each(const vf *x, int n, float *out) {
  for (int i = 0; i < n; i += W) {
    vf y[W];
    for (int j = 0; j < W; j++) y[j] = x[i + j];
    sum_step<1>(y);
    store(out + i, y[0]);
  }
}

}  // namespace ev

// Products of a few rows with one weight matrix:  y[b, o] = sum_i w[o, i] x[b, i],  w in fp32, bf16, int8 or int4.
//
// fp32 and bf16 are read as they lie, [out, in]; bf16 rounds x to bf16 too. Integers are packed for the lanes of a
// vector: 16 outputs side by side, four inputs of each in 32 bits, inputs padded to a multiple of 32 and outputs to
// one of 16, so a block of 16 outputs is one stream of memory.
//   INT8  bytes w + 128, [out/16][in/4][16][4]; scale fp32 [out]
//   INT4  values w + 8, two to a byte: [out/16][in/32][4][16][4], the low half for inputs 8j..8j+3 of a group of 32,
//         the high half for inputs 8j+4..8j+7; scale bf16 [out/16][in/32][16]
// For these x becomes 8-bit digits, two for INT8 (as good as 15 bits), one with a scale for each group for INT4; their
// products are summed exactly in int32, over a whole row or a group. The sums of one row of x are taken in one order,
// whatever else is in the batch and however the outputs are split.
#pragma once
#include <cmath>

#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define EV_DOT 1  // vpdpbusd and vdpbf16ps
#endif

#if defined(__clang__)
#define EV_UNROLL _Pragma("unroll")
#else
#define EV_UNROLL _Pragma("GCC unroll 16")
#endif

namespace ev {

enum Weights : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

struct Product {
  int64_t kind, out, in;
  const void *weight, *scale;  // scale: fp32 for INT8, bf16 for INT4, else null
};

namespace product {

constexpr int LANES = 16, GROUP = 32;
constexpr float TOP = 16256;  // 127 * 128: the largest |x| in two digits

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- fp32 and bf16: dot products along the rows of the matrix ----

typedef float v4 __attribute__((vector_size(16)));

inline float total(vf v) {  // quarters of the vector, then the lanes of one
  v4 part[W / 4];
  std::memcpy(part, &v, sizeof v);
  for (int n = W / 8; n; n /= 2)
    for (int i = 0; i < n; i++) part[i] += part[i + n];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

struct Fp32 {
  typedef float Weight;
  typedef vf V;
  static constexpr int STEP = W, BYTES = 4;  // inputs a step, bytes of one prepared input
  static V weight(const float *w) { return load(w); }
  static V weight(const float *w, int n) { return load(w, n); }
  static V input(const char *x, int64_t k) { return load((const float *)x + k); }
  static vf add(vf sum, V w, V x) { return sum + w * x; }
  static void prepare(char *to, const float *x, int n) { store((float *)to, load(x, n)); }
};

#if defined(EV_DOT)
struct Bf16 {
  typedef bf16 Weight;
  typedef __m512bh V;
  static constexpr int STEP = 32, BYTES = 2;
  static V weight(const bf16 *w) { return (V)_mm512_loadu_si512(w); }
  static V weight(const bf16 *w, int n) { return (V)_mm512_maskz_loadu_epi16(uint32_t((1ull << n) - 1), w); }
  static V input(const char *x, int64_t k) { return (V)_mm512_loadu_si512((const bf16 *)x + k); }
  static vf add(vf sum, V w, V x) { return (vf)_mm512_dpbf16_ps((__m512)sum, w, x); }
  static void prepare(char *to, const float *x, int n) {
    store((bf16 *)to, load(x, n < W ? n : W));
    store((bf16 *)to + W, n > W ? load(x + W, n - W) : vf{});
  }
};
#else
struct Bf16 {  // a step of even and odd inputs, widened to fp32
  typedef bf16 Weight;
  struct V {
    vf even, odd;
  };
  static constexpr int STEP = 2 * W, BYTES = 4;
  static V split(vu both) { return {(vf)(both << 16), (vf)(both & 0xffff0000u)}; }
  static V weight(const bf16 *w) {
    vu both;
    std::memcpy(&both, w, sizeof both);
    return split(both);
  }
  static V weight(const bf16 *w, int n) {
    vu both{};
    std::memcpy(&both, w, n * sizeof(bf16));
    return split(both);
  }
  static V input(const char *x, int64_t k) { return {load((const float *)x + k), load((const float *)x + k + W)}; }
  static vf add(vf sum, const V &w, const V &x) { return sum + w.even * x.even + w.odd * x.odd; }
  static void prepare(char *to, const float *x, int n) {
    bf16 rounded[2 * W];
    store(rounded, load(x, n < W ? n : W));
    store(rounded + W, n > W ? load(x + W, n - W) : vf{});
    const V v = weight(rounded);
    store((float *)to, v.even);
    store((float *)to + W, v.odd);
  }
};
#endif

// OUT outputs of ROWS rows; every sum runs over the inputs in the same order in every tile.
template <class K, int OUT, int ROWS>
inline void dots(const Product &p, const char *x, int64_t row_bytes, int64_t o, float *y, int64_t y_stride) {
  const auto *w = (const typename K::Weight *)p.weight + o * p.in;
  vf sum[OUT][ROWS] = {};
  int64_t k = 0;
  for (; k + K::STEP <= p.in; k += K::STEP) {
    typename K::V weight[OUT];
    EV_UNROLL
    for (int j = 0; j < OUT; j++) {
      weight[j] = K::weight(w + j * p.in + k);
      __builtin_prefetch(w + OUT * (p.in + k) + j * K::STEP);  // the next tile, as it lies in memory
    }
    EV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const auto in = K::input(x + r * row_bytes, k);
      EV_UNROLL
      for (int j = 0; j < OUT; j++) sum[j][r] = K::add(sum[j][r], weight[j], in);
    }
  }
  if (k < p.in)
    EV_UNROLL
    for (int j = 0; j < OUT; j++) {
      const auto weight = K::weight(w + j * p.in + k, int(p.in - k));
      EV_UNROLL
      for (int r = 0; r < ROWS; r++) sum[j][r] = K::add(sum[j][r], weight, K::input(x + r * row_bytes, k));
    }
  EV_UNROLL
  for (int r = 0; r < ROWS; r++)
    EV_UNROLL
    for (int j = 0; j < OUT; j++) y[r * y_stride + o + j] = total(sum[j][r]);
}

// ---- integers: 16 outputs in the lanes, four inputs a step ----

struct Sixteen {
  vi part[LANES / W];
};

#if defined(EV_DOT)
struct Int {
  typedef int8_t Digit;
  typedef vi Sums;
  typedef __m512i Chunk;  // four inputs of 16 outputs
  static constexpr int ROWS = 6;    // of x in a tile
  static constexpr int SHARED = 5;  // from so many rows on two blocks share them; for fewer one stream is faster
  static Chunk bytes(const uint8_t *w) { return _mm512_loadu_si512(w); }
  static void halves(const uint8_t *w, Chunk &low, Chunk &high) {
    const __m512i v = _mm512_loadu_si512(w), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(v, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
  }
  static Sums add(Sums s, Chunk w, const Digit *x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return (vi)_mm512_dpbusd_epi32((__m512i)s, w, _mm512_set1_epi32(four));
  }
  static Sixteen lanes(Sums s) { return {{s}}; }
};
#else
struct Int {
  static constexpr int PARTS = 2 * LANES / W, ROWS = W == 16 ? 3 : 1, SHARED = W == 16 ? 5 : 1 << 30;
  typedef int16_t Digit;
  typedef uint8_t vb __attribute__((vector_size(2 * W)));
  typedef int16_t vw __attribute__((vector_size(4 * W)));
  typedef int64_t vl __attribute__((vector_size(4 * W)));
  struct Chunk {
    vw v[PARTS];  // W / 2 outputs each
  };
  struct Sums {
    vi v[PARTS];  // of inputs 0 and 1, and of inputs 2 and 3, of each output
  };
  static vw part(const uint8_t *w, int i) {
    vb v;
    std::memcpy(&v, w + 2 * W * i, sizeof v);
#if defined(__AVX2__) && !defined(__AVX512BW__)
    return (vw)_mm256_cvtepu8_epi16((__m128i)v);
#else
    return __builtin_convertvector(v, vw);
#endif
  }
  static Chunk bytes(const uint8_t *w) {
    Chunk c;
    EV_UNROLL
    for (int i = 0; i < PARTS; i++) c.v[i] = part(w, i);
    return c;
  }
  static void halves(const uint8_t *w, Chunk &low, Chunk &high) {
    EV_UNROLL
    for (int i = 0; i < PARTS; i++) {
      const vw both = part(w, i);
      low.v[i] = both & 15;
      high.v[i] = both >> 4;
    }
  }
  static vi pairs(vw a, vw b) {  // products of neighbours, summed
#if defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return ((vi)a >> 16) * ((vi)b >> 16) + ((vi)a << 16 >> 16) * ((vi)b << 16 >> 16);
#endif
  }
  static Sums add(Sums s, const Chunk &w, const Digit *x) {
    int64_t four;
    std::memcpy(&four, x, 8);
    const vw in = (vw)(vl{} + four);
    EV_UNROLL
    for (int i = 0; i < PARTS; i++) s.v[i] += pairs(w.v[i], in);
    return s;
  }
  static Sixteen lanes(const Sums &s) {
    Sixteen t;
#if defined(__AVX512BW__)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    t.part[0] = (vi)_mm512_permutex2var_epi32((__m512i)s.v[0], even, (__m512i)s.v[1]) +
                (vi)_mm512_permutex2var_epi32((__m512i)s.v[0], odd, (__m512i)s.v[1]);
#elif defined(__AVX2__)
    EV_UNROLL
    for (int i = 0; i < 2; i++) {
      const __m256i sum = _mm256_hadd_epi32((__m256i)s.v[2 * i], (__m256i)s.v[2 * i + 1]);
      t.part[i] = (vi)_mm256_permute4x64_epi64(sum, 0xd8);
    }
#else
    for (int o = 0; o < LANES; o++)
      t.part[o / W][o % W] = s.v[2 * o / W][2 * o % W] + s.v[2 * o / W][2 * o % W + 1];
#endif
    return t;
  }
};
#endif

// The largest |x| of n values, NaN where one is not finite.
inline float largest(const float *x, int64_t n) {
  vf most{}, odd{};  // odd: 0, or NaN where an input is not finite
  for (int64_t i = 0; i < n; i += W) {
    const vf v = load(x + i, int(n - i < W ? n - i : W));
    const vf size = select(v < 0, -v, v);
    most = select(size > most, size, most);
    odd += v - v;
  }
  float top[W], bad[W];
  store(top, most), store(bad, odd);
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; i++) top[i] = top[i + n] > top[i] ? top[i + n] : top[i], bad[i] += bad[i + n];
  return top[0] + bad[0];
}

// What to multiply by so that ``top`` becomes ``most``; 0 for values so small (or not finite) that there is nothing.
inline float inverse(float top, float most) { return top >= 1e-34f && top < INFINITY ? most / top : 0; }

// round(x[at..] * by), zeros beyond n and where ``by`` is 0.
inline vi rounded(const float *x, int64_t at, int64_t n, float by) {
  if (at >= n || by == 0) return vi{};
  const vf v = load(x + at, int(n - at < W ? n - at : W)) * by;
#if defined(__AVX512F__)
  return (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (vi)_mm_cvtps_epi32((__m128)v);
#else
  return __builtin_convertvector((v + 12582912.0f) - 12582912.0f, vi);
#endif
}
inline void shrink(Int::Digit *to, vi v) {
  typedef Int::Digit vd __attribute__((vector_size(W * sizeof(Int::Digit))));
  const vd digits = __builtin_convertvector(v, vd);
  std::memcpy(to, &digits, sizeof digits);
}
inline int32_t total(vi v) {
  int32_t sum = 0;
  for (int i = 0; i < W; i++) sum += v[i];
  return sum;
}

// A row of x for INT8: two digits, round(x 16256 / max|x|) = 128 high + low; four high digits, four low ones, ...
struct Row {
  float scale;
  int32_t high, low;  // sums of the digits
  int32_t unused[13];
};

inline const Int::Digit *digits(const char *row) { return (const Int::Digit *)(row + sizeof(Row)); }

inline void prepare_row(const Product &p, const float *x, char *row) {
  const float top = largest(x, p.in), by = inverse(top, TOP);
  auto *to = (Int::Digit *)digits(row);
  Int::Digit high[GROUP], low[GROUP];
  vi high_sum{}, low_sum{};
  for (int64_t g = 0; g < p.in; g += GROUP) {
    for (int i = 0; i < GROUP; i += W) {
      const vi q = rounded(x, g + i, p.in, by), h = (q + 64) >> 7, l = q - 128 * h;
      high_sum += h, low_sum += l;
      shrink(high + i, h), shrink(low + i, l);
    }
    for (int i = 0; i < GROUP; i += 4) {
      std::memcpy(to + 2 * (g + i), high + i, 4 * sizeof *high);
      std::memcpy(to + 2 * (g + i) + 4, low + i, 4 * sizeof *low);
    }
  }
  *(Row *)row = {by == 0 ? top - top : top / TOP, total(high_sum), total(low_sum), {}};
}

// A row of x for INT4: per group of 32 a scale, -8 times the sum of the digits, and one digit, round(x 127 / max|x|),
// whose error is small beside that of the weights.
struct Scaled {
  float *scale;
  int32_t *offset;
  Int::Digit *digits;
};

inline Scaled scaled(const Product &p, const char *row) {
  const int64_t lines = padded(p.in, GROUP * 16) / GROUP;
  float *scale = (float *)row;
  return {scale, (int32_t *)(scale + lines), (Int::Digit *)(scale + 2 * lines)};
}

inline void prepare_groups(const Product &p, const float *x, char *row) {
  const Scaled to = scaled(p, row);
  for (int64_t g = 0; g * GROUP < p.in; g++) {
    const int64_t n = p.in - g * GROUP < GROUP ? p.in - g * GROUP : GROUP;
    const float top = largest(x + g * GROUP, n), by = inverse(top, 127);
    vi sum{};
    for (int i = 0; i < GROUP; i += W) {
      const vi q = rounded(x, g * GROUP + i, p.in, by);
      shrink(to.digits + g * GROUP + i, q);
      sum += q;
    }
    to.scale[g] = by == 0 ? top - top : top / 127;
    to.offset[g] = -8 * total(sum);
  }
}

inline void write(const Product &p, int64_t o, const vf *result, float *y) {
  const int n = int(p.out - o < LANES ? p.out - o : LANES);
  for (int i = 0; i < LANES / W; i++)
    if (i * W < n) store(y + o + i * W, result[i], n - i * W < W ? n - i * W : W);
}

template <int BLOCKS, int ROWS>
inline void int8_tile(const Product &p, const char *x, int64_t row_bytes, int64_t o, float *y, int64_t y_stride) {
  const int64_t steps = padded(p.in, GROUP) / 4;
  const auto *w = (const uint8_t *)p.weight + o * steps * 4;
  const Int::Digit *in[ROWS];
  Int::Sums high[BLOCKS][ROWS] = {}, low[BLOCKS][ROWS] = {};
  EV_UNROLL
  for (int r = 0; r < ROWS; r++) in[r] = digits(x + r * row_bytes);
  for (int64_t k = 0; k < steps; k++) {
    Int::Chunk chunk[BLOCKS];
    EV_UNROLL
    for (int j = 0; j < BLOCKS; j++) {
      chunk[j] = Int::bytes(w + (j * steps + k) * 64);
      __builtin_prefetch(w + ((BLOCKS + j) * steps + k) * 64);
    }
    EV_UNROLL
    for (int r = 0; r < ROWS; r++)
      EV_UNROLL
      for (int j = 0; j < BLOCKS; j++) {
        high[j][r] = Int::add(high[j][r], chunk[j], in[r] + 8 * k);
        low[j][r] = Int::add(low[j][r], chunk[j], in[r] + 8 * k + 4);
      }
  }
  EV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const Row &row = *(const Row *)(x + r * row_bytes);
    EV_UNROLL
    for (int j = 0; j < BLOCKS; j++) {
      const Sixteen h = Int::lanes(high[j][r]), l = Int::lanes(low[j][r]);
      vf result[LANES / W];
      EV_UNROLL
      for (int i = 0; i < LANES / W; i++) {
        const vf scale = load((const float *)p.scale + o + j * LANES + i * W);
        const vf sum = __builtin_convertvector(h.part[i] - 128 * row.high, vf) * 128.0f +
                       __builtin_convertvector(l.part[i] - 128 * row.low, vf);
        result[i] = sum * scale * row.scale;
      }
      write(p, o + j * LANES, result, y + r * y_stride);
    }
  }
}

template <int BLOCKS, int ROWS>
inline void int4_tile(const Product &p, const char *x, int64_t row_bytes, int64_t o, float *y, int64_t y_stride) {
  const int64_t groups = padded(p.in, GROUP) / GROUP;
  const auto *w = (const uint8_t *)p.weight + o * groups * 16;
  const auto *scales = (const bf16 *)p.scale + o * groups;
  const Scaled x0 = scaled(p, x);
  vf sum[BLOCKS][ROWS][LANES / W] = {};
  for (int64_t g = 0; g < groups; g++) {
    Int::Sums dot[BLOCKS][ROWS] = {};
    if (g % 2 == 0) __builtin_prefetch(scales + (BLOCKS * groups + g) * LANES);
    EV_UNROLL
    for (int s = 0; s < 4; s++)
      EV_UNROLL
      for (int j = 0; j < BLOCKS; j++) {
        const uint8_t *from = w + ((j * groups + g) * 4 + s) * 64;
        Int::Chunk first, second;
        Int::halves(from, first, second);
        __builtin_prefetch(from + BLOCKS * groups * 256);
        EV_UNROLL
        for (int r = 0; r < ROWS; r++) {
          const auto *in = (const Int::Digit *)((const char *)x0.digits + r * row_bytes) + GROUP * g + 8 * s;
          dot[j][r] = Int::add(Int::add(dot[j][r], first, in), second, in + 4);
        }
      }
    EV_UNROLL
    for (int j = 0; j < BLOCKS; j++)
      EV_UNROLL
      for (int r = 0; r < ROWS; r++) {
        const int32_t offset = ((const int32_t *)((const char *)x0.offset + r * row_bytes))[g];
        const float size = ((const float *)((const char *)x0.scale + r * row_bytes))[g];
        const Sixteen whole = Int::lanes(dot[j][r]);
        EV_UNROLL
        for (int i = 0; i < LANES / W; i++) {
          const vf scale = load(scales + (j * groups + g) * LANES + i * W);
          sum[j][r][i] += __builtin_convertvector(whole.part[i] + offset, vf) * (scale * size);
        }
      }
  }
  EV_UNROLL
  for (int r = 0; r < ROWS; r++)
    EV_UNROLL
    for (int j = 0; j < BLOCKS; j++) write(p, o + j * LANES, sum[j][r], y + r * y_stride);
}

// ---- tiles over the batch ----

template <class K, int OUT>
struct Dense {
  static constexpr int ROWS = W == 16 ? 6 : 3;
  template <int N>
  static void tile(const Product &p, const char *x, int64_t bytes, int64_t o, float *y, int64_t stride) {
    dots<K, OUT, N>(p, x, bytes, o, y, stride);
  }
};
template <int BLOCKS>
struct Eight {
  static constexpr int ROWS = Int::ROWS;
  template <int N>
  static void tile(const Product &p, const char *x, int64_t bytes, int64_t o, float *y, int64_t stride) {
    int8_tile<BLOCKS, N>(p, x, bytes, o, y, stride);
  }
};
template <int BLOCKS>
struct Four {
  static constexpr int ROWS = Int::ROWS;
  template <int N>
  static void tile(const Product &p, const char *x, int64_t bytes, int64_t o, float *y, int64_t stride) {
    int4_tile<BLOCKS, N>(p, x, bytes, o, y, stride);
  }
};

// The whole batch against the outputs from o on, in tiles of like heights.
template <class T>
inline void batched(const Product &p, int64_t batch, const char *x, int64_t bytes, int64_t o, float *y,
                    int64_t stride) {
  for (int64_t b = 0; b < batch;) {
    const int64_t left = batch - b, tiles = (left + T::ROWS - 1) / T::ROWS, rows = (left + tiles - 1) / tiles;
    const char *from = x + b * bytes;
    float *to = y + b * stride;
    if constexpr (T::ROWS >= 6)
      if (rows == 6) T::template tile<6>(p, from, bytes, o, to, stride);
    if constexpr (T::ROWS >= 5)
      if (rows == 5) T::template tile<5>(p, from, bytes, o, to, stride);
    if constexpr (T::ROWS >= 4)
      if (rows == 4) T::template tile<4>(p, from, bytes, o, to, stride);
    if constexpr (T::ROWS >= 3)
      if (rows == 3) T::template tile<3>(p, from, bytes, o, to, stride);
    if constexpr (T::ROWS >= 2)
      if (rows == 2) T::template tile<2>(p, from, bytes, o, to, stride);
    if (rows == 1) T::template tile<1>(p, from, bytes, o, to, stride);
    b += rows;
  }
}

template <class Many, class One>
inline void walk(const Product &p, int64_t batch, const char *x, int64_t bytes, int64_t begin, int64_t end,
                 int64_t many, int64_t one, float *y, int64_t stride) {
  int64_t o = begin;
  for (; o + many <= end; o += many) batched<Many>(p, batch, x, bytes, o, y, stride);
  for (; o < end; o += one) batched<One>(p, batch, x, bytes, o, y, stride);
}

template <class K>
inline void prepare_dense(const Product &p, const float *x, char *row) {
  for (int64_t i = 0; i < p.in; i += K::STEP)
    K::prepare(row + i * K::BYTES, x + i, int(p.in - i < K::STEP ? p.in - i : K::STEP));
}

inline int64_t row_bytes(const Product &p) {
  if (p.kind == FP32) return padded(p.in, Fp32::STEP) * Fp32::BYTES;
  if (p.kind == BF16) return padded(p.in, Bf16::STEP) * Bf16::BYTES;
  if (p.kind == INT8) return sizeof(Row) + padded(p.in, GROUP) * 2 * sizeof(Int::Digit);
  return padded(p.in, GROUP * 16) / GROUP * 8 + padded(p.in, 64) * sizeof(Int::Digit);
}

}  // namespace product

// Bytes of the prepared x.
inline int64_t product_scratch(const Product &p, int64_t batch) { return batch * product::row_bytes(p); }

// Round or quantise rows begin..end of x [batch, in] into ``scratch``; rows do not depend on each other.
inline void product_prepare(const Product &p, int64_t begin, int64_t end, const float *x, int64_t x_stride,
                            void *scratch) {
  using namespace product;
  for (int64_t b = begin; b < end; b++) {
    const float *from = x + b * x_stride;
    char *to = (char *)scratch + b * row_bytes(p);
    if (p.kind == FP32)
      prepare_dense<Fp32>(p, from, to);
    else if (p.kind == BF16)
      prepare_dense<Bf16>(p, from, to);
    else if (p.kind == INT8)
      prepare_row(p, from, to);
    else
      prepare_groups(p, from, to);
  }
}
inline void product_prepare(const Product &p, int64_t batch, const float *x, int64_t x_stride, void *scratch) {
  product_prepare(p, 0, batch, x, x_stride, scratch);
}

// Outputs begin..end of all rows; begin a multiple of 16, end one too or ``out``.
inline void product_rows(const Product &p, int64_t batch, const void *scratch, int64_t begin, int64_t end, float *y,
                         int64_t y_stride) {
  using namespace product;
  const char *x = (const char *)scratch;
  const int64_t bytes = row_bytes(p);
  if (p.kind == FP32)
    walk<Dense<Fp32, 4>, Dense<Fp32, 1>>(p, batch, x, bytes, begin, end, 4, 1, y, y_stride);
  else if (p.kind == BF16)
    walk<Dense<Bf16, 4>, Dense<Bf16, 1>>(p, batch, x, bytes, begin, end, 4, 1, y, y_stride);
  else if (p.kind == INT8)
    batch < Int::SHARED ? walk<Eight<1>, Eight<1>>(p, batch, x, bytes, begin, end, LANES, LANES, y, y_stride)
                   : walk<Eight<2>, Eight<1>>(p, batch, x, bytes, begin, end, 2 * LANES, LANES, y, y_stride);
  else
    batch < Int::SHARED ? walk<Four<1>, Four<1>>(p, batch, x, bytes, begin, end, LANES, LANES, y, y_stride)
                   : walk<Four<2>, Four<1>>(p, batch, x, bytes, begin, end, 2 * LANES, LANES, y, y_stride);
}

// The memory of the weights of outputs begin..end (multiples of 16, or ``out``), without scales.
struct Bytes {
  const char *from, *to;
};
inline Bytes product_bytes(const Product &p, int64_t begin, int64_t end) {
  const int64_t wide = product::padded(p.in, product::GROUP);
  const int64_t row = p.kind == FP32 ? p.in * 4 : p.kind == BF16 ? p.in * 2 : p.kind == INT8 ? wide : wide / 2;
  return {(const char *)p.weight + begin * row, (const char *)p.weight + end * row};
}

// Rows begin..end of the matrix, dequantised: [end - begin, in] in fp32 or bf16.
template <class T>
inline void product_unpack(const Product &p, int64_t begin, int64_t end, T *rows) {
  using namespace product;
  typedef uint8_t u4 __attribute__((vector_size(4)));
  typedef uint32_t w4 __attribute__((vector_size(16)));
  const int64_t wide = padded(p.in, GROUP);
  for (int64_t o = begin; o < end; o++) {
    T *to = rows + (o - begin) * p.in;
    if (p.kind == FP32 || p.kind == BF16) {
      for (int64_t i = 0; i < p.in; i += W) {
        const int n = int(p.in - i < W ? p.in - i : W);
        const int64_t at = o * p.in + i;
        store(to + i, p.kind == FP32 ? load((const float *)p.weight + at, n) : load((const bf16 *)p.weight + at, n), n);
      }
      continue;
    }
    const int64_t block = o / LANES, lane = o % LANES;
    const float whole = p.kind == INT8 ? ((const float *)p.scale)[o] : 0;
    for (int64_t g = 0; g < wide / GROUP; g++) {
      float values[GROUP];
      const auto *scales = (const bf16 *)p.scale + (block * (wide / GROUP) + g) * LANES;
      const float scale = p.kind == INT8 ? whole : scalar(scales[lane]);
      const int64_t line = p.kind == INT8 ? block * wide / 4 + g * 8 : (block * (wide / GROUP) + g) * 4;
      for (int s = 0; s < GROUP / 4; s++) {
        u4 four;
        std::memcpy(&four, (const uint8_t *)p.weight + (line + (p.kind == INT8 ? s : s / 2)) * 64 + lane * 4, 4);
        w4 u = __builtin_convertvector(four, w4);
        if (p.kind == INT4) u = s % 2 ? u >> 4 : u & 15u;
        typedef int32_t s4 __attribute__((vector_size(16)));
        const v4 v = __builtin_convertvector((s4)u - (p.kind == INT8 ? 128 : 8), v4) * scale;
        std::memcpy(values + 4 * s, &v, 16);
      }
      const int64_t n = p.in - g * GROUP < GROUP ? p.in - g * GROUP : GROUP;
      for (int64_t i = 0; i < n; i += W)
        store(to + g * GROUP + i, load(values + i, int(n - i < W ? n - i : W)), int(n - i < W ? n - i : W));
    }
  }
}

}  // namespace ev

// The formats of a weight matrix (see product.h): how its numbers are read and multiplied, and how x is prepared for it.
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

}  // namespace product

}  // namespace ev

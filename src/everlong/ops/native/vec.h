// Vectors of W floats for the instruction set this file is compiled for, and the few functions kernels need.
// The same source is built once per instruction set (AVX-512, AVX2, portable); GCC and Clang vector extensions do the rest.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define EV_WIDTH 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define EV_WIDTH 8
#else
#define EV_WIDTH 4
#endif

#if defined(_OPENMP)
extern "C" int omp_get_thread_num();
#define EV_PRAGMA(x) _Pragma(#x)
#else
inline int omp_get_thread_num() { return 0; }
#endif

#define EV_BOTH __attribute__((always_inline))  // of lambdas called twice, for whole vectors and for the rest

namespace ev {

constexpr int W = EV_WIDTH;
typedef float vf __attribute__((vector_size(4 * EV_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * EV_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * EV_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * EV_WIDTH)));

struct bf16 {
  uint16_t bits;
};

inline float scalar(float x) { return x; }
inline float scalar(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline vf splat(float x) { return x - vf{}; }  // x + 0 would be an addition: it changes -0

inline vf load(const float *p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bf16 *p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  vu u = __builtin_convertvector(h, vu) << 16;
  return (vf)u;
}
inline void store(float *p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vh to_bf16(vf v) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)  // one instruction, which takes numbers below 1.2e-38 for 0
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  vh h;
  std::memcpy(&h, &rounded, sizeof h);
  return h;
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  return __builtin_convertvector(v != v ? nan : rounded, vh);
#endif
}
inline void store(bf16 *p, vf v) {
  vh h = to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}

// The first n lanes (n <= W); the others are zero when loaded and untouched when stored.
template <class T>
inline vf load(const T *p, int n) {
  if (n == W) return load(p);
  T full[W] = {};
  std::memcpy(full, p, n * sizeof(T));
  return load(full);
}
template <class T>
inline void store(T *p, vf v, int n) {
  if (n == W) return store(p, v);
  T full[W];
  store(full, v);
  std::memcpy(p, full, n * sizeof(T));
}

// Pairs of neighbouring lanes (real and imaginary parts): exchanged, the first twice, the second twice.
typedef uint64_t vpair __attribute__((vector_size(4 * EV_WIDTH)));
inline vf swapped(vf v) { return (vf)((vpair)v >> 32 | (vpair)v << 32); }
inline vf firsts(vf v) { return (vf)((vpair)v << 32 | ((vpair)v & 0xffffffffu)); }
inline vf seconds(vf v) { return (vf)((vpair)v >> 32 | ((vpair)v & ~uint64_t(0xffffffffu))); }
// The first half of the lanes, each twice; and back, the first lane of each pair (the other half is zero).
typedef uint32_t vhalf __attribute__((vector_size(2 * EV_WIDTH)));
inline vf twice(vf v) {
  vhalf half;
  std::memcpy(&half, &v, sizeof half);
  const vpair wide = __builtin_convertvector(half, vpair);
  return (vf)(wide | wide << 32);
}
inline vf once(vf v) {
  const vhalf half = __builtin_convertvector((vpair)v, vhalf);
  vf out{};
  std::memcpy(&out, &half, sizeof half);
  return out;
}
inline vf alternating() {  // -1, 1, -1, 1, ...
  vf v = splat(1.0f);
  for (int i = 0; i < W; i += 2) v[i] = -1.0f;
  return v;
}

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// The sum of all lanes, by halves.
template <int N>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * N)));
  static float sum(type v) {
    typename Lanes<N / 2>::type low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, (const char *)&v + sizeof low, sizeof high);
    return Lanes<N / 2>::sum(low + high);
  }
};
template <>
struct Lanes<1> {
  typedef float type;
  static float sum(float v) { return v; }
};
inline float sum(vf v) { return Lanes<W>::sum(v + vf{}); }  // halves of a new value: v itself stays in a register

// Four vectors to one: lane 4 i + j is the sum of lanes 4 i to 4 i + 3 of vector j.
inline vf quarters(vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
  const vf ab = (vf)_mm512_maskz_unpacklo_ps(-1, a, b) + (vf)_mm512_maskz_unpackhi_ps(-1, a, b);
  const vf cd = (vf)_mm512_maskz_unpacklo_ps(-1, c, d) + (vf)_mm512_maskz_unpackhi_ps(-1, c, d);
  return (vf)_mm512_maskz_unpacklo_pd(-1, (__m512d)ab, (__m512d)cd) + (vf)_mm512_maskz_unpackhi_pd(-1, (__m512d)ab, (__m512d)cd);
#elif defined(__AVX2__)
  const vf ab = (vf)_mm256_unpacklo_ps(a, b) + (vf)_mm256_unpackhi_ps(a, b);
  const vf cd = (vf)_mm256_unpacklo_ps(c, d) + (vf)_mm256_unpackhi_ps(c, d);
  return (vf)_mm256_unpacklo_pd((__m256d)ab, (__m256d)cd) + (vf)_mm256_unpackhi_pd((__m256d)ab, (__m256d)cd);
#else
  const vf in[4] = {a, b, c, d};
  vf out;
  for (int i = 0; i < W; i += 4)
    for (int j = 0; j < 4; j++) out[i + j] = (in[j][i] + in[j][i + 2]) + (in[j][i + 1] + in[j][i + 3]);
  return out;
#endif
}

// exp(r) for |r| <= log(2) / 2, relative error below 1e-7; r^2 times a polynomial of degree 4, fitted, plus r + 1.
inline vf exp_near_0(vf r) {
  vf p = splat(1.38144e-3f);
  p = p * r + 8.36875e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.666652e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// exp(x), relative error below 2e-7 for -87 <= x <= 88; below that 0, above that exp(88); NaN stays NaN.
inline vf exp(vf x) {
#if defined(__AVX512F__)  // rounding to integers (8: to nearest) and scaling by powers of two are instructions
  const __m512 y = _mm512_maskz_min_ps(-1, splat(88.0f), x);
  const __m512 n = _mm512_maskz_roundscale_ps(-1, (vf)y * 1.44269504f, 8);
  const vf p = exp_near_0((vf)y - (vf)n * 0.693145752f - (vf)n * 1.42860677e-6f);
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(y, splat(-87.3f), _CMP_NLT_UQ), p, n);
#else
  vf low = splat(-87.3f), high = splat(88.0f);
  vi tiny = x < low;
  vf y = select(x > high, high, select(tiny, low, x));
  vf n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;
  vf p = exp_near_0(y - n * 0.693145752f - n * 1.42860677e-6f);
  vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
  return select(tiny, vf{}, p * (vf)scale);
#endif
}

// 1 / (1 + exp(-x)), relative error below 3e-7 for x >= -87, below that at most exp(-87).
inline vf sigmoid(vf x) { return 1.0f / (1.0f + ev::exp(-x)); }

// sin(x) and cos(x), absolute error below 2e-7 for |x| <= 8192; above that below 2e-7 + 2e-16 |x|.
inline void sin_cos(vf x, vf &sine, vf &cosine) {
  for (int i = 0; i < W; i++)
    if (!(x[i] <= 8192.0f && x[i] >= -8192.0f)) x[i] = float(std::remainder(double(x[i]), 6.283185307179586));
  const vf n = (x * 0.636619772f + 12582912.0f) - 12582912.0f;  // quarter turns
  vf r = x - n * 1.5703125f;
  r = r - n * 4.83751297e-4f;
  r = r - n * 7.54979013e-8f;
  const vf r2 = r * r;
  const vf s = r + r * r2 * ((r2 * -1.9517e-4f + 8.33218e-3f) * r2 - 1.6666655e-1f);
  const vf c = 1.0f - 0.5f * r2 + r2 * r2 * ((r2 * 2.44380909e-5f - 1.38873645e-3f) * r2 + 4.16666468e-2f);
  const vi q = __builtin_convertvector(n, vi);
  const vi odd = -(q & 1), half = q << 30, both = (q + 1) << 30;  // signs: of half turns, and for cos one quarter on
  const vi sign = int32_t(1u << 31) + vi{};
  sine = (vf)((vi)select(odd, c, s) ^ (half & sign));
  cosine = (vf)((vi)select(odd, s, c) ^ (both & sign));
}

// log(1 + exp(x)), relative error below 3e-7 for x >= -87; below that 0. log(1 + e) = 2 artanh(e / (2 + e)).
inline vf softplus(vf x) {
  const vf e = ev::exp(select(x < 0.0f, x, -x));
  const vf s = e / (2.0f + e), s2 = s * s;
  vf p = splat(0.14012315f);
  p = p * s2 + 0.13999554f;
  p = p * s2 + 0.2001085f;
  p = p * s2 + 0.33333207f;
  return select(x > 0.0f, x, vf{}) + 2.0f * (s + s * s2 * p);
}

// 2^x for x <= 0, relative error below 4e-7 down to 2^-126, below that 0; NaN stays NaN. For decays, scaled by LOG2E.
constexpr float LOG2E = 1.44269504f;
#if defined(__AVX512F__)
// 2^(j / 32) without the bits that hold j when it is shifted to the exponent, so that one sum puts both together.
alignas(64) constexpr uint32_t POWERS[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
inline vf exp2_decay(vf x) {
  constexpr float ROUND = 393216.0f;  // 1.5 * 2^18: adding it leaves a whole number of 32nds in the last bits
  const vf t = x + ROUND, r = x - (t - ROUND);
  const vu power = (vu)_mm512_permutex2var_epi32(_mm512_load_si512(POWERS), (__m512i)t, _mm512_load_si512(POWERS + 16));
  const vf p = (r * 0.24022651f + 0.69314718f) * r + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_mul_ps(normal, (vf)(power + ((vu)t << 18)), p);
}
#else
inline vf exp2_decay(vf x) {
  const vi tiny = x < -126.0f;
  const vf y = select(tiny, vf{}, x), n = (y + 12582912.0f) - 12582912.0f, r = y - n;
  vf p = splat(1.32647e-3f);
  p = p * r + 9.67151e-3f;
  p = p * r + 5.550734e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.93147e-1f;
  p = p * r + 1.0f;
  const vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
  return select(tiny, vf{}, p * (vf)scale);
}
#endif

}  // namespace ev

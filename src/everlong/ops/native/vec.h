// Vectors of W floats for the instruction set this file is compiled for, and the few functions kernels need.
// The same source is built three times (AVX-512, AVX2, portable); GCC and Clang vector extensions do the rest.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define EV_WIDTH 16
#elif defined(__AVX2__)
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
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  vu is_nan = (vu)(v != v);
  return __builtin_convertvector((is_nan & nan) | (~is_nan & rounded), vh);
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

inline vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
}

// exp(x), relative error below 2e-7 for -87 <= x <= 88; below that 0, above that exp(88); NaN stays NaN.
inline vf exp(vf x) {
  vf low = splat(-87.3f), high = splat(88.0f);
  vi tiny = x < low;
  vf y = select(x > high, high, select(tiny, low, x));
  vf n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;
  vf r = y - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
  return select(tiny, vf{}, p * (vf)scale);
}

}  // namespace ev

// The gates of the RG-LRU:  g = decay R,  b = sqrt(1 - exp(2 g)) I x,  R = sigmoid(r + r_bias), I = sigmoid(i + i_bias);
// at first tokens g = -inf and b = I x. r and i come as they leave a product per head: [tokens, heads, n] with steps of
// their own. The backward pass starts from the inputs.
#include <cmath>
#include <vector>

#include "memory.h"
#include "vec.h"

using namespace ev;

namespace {

constexpr float FLATTEST = 1e-3f;  // twice the root is taken for at least this in its slope, 1 / (2 root)

// 1 - exp(x) for x <= 0, relative error below 3e-7.
inline vf one_minus_exp(vf x) {
  vf p = splat(1.38144e-3f);  // exp_near_0 without its 1
  p = p * x + 8.36875e-3f;
  p = p * x + 4.166839e-2f;
  p = p * x + 1.666652e-1f;
  p = p * x + 0.5f;
  return select(x > -0.34f, -x * (p * x + 1.0f), 1.0f - ev::exp(x));
}

inline vf root(vf x) {
  for (int i = 0; i < W; i++) x[i] = std::sqrt(x[i]);
  return x;
}

template <class T>
struct Gates {
  int64_t tokens, heads, n;
  const T *x, *r, *i;  // x [tokens, heads, n]
  int64_t r_token, r_head, i_token, i_head;
  const float *r_bias, *i_bias, *decay;  // [heads n]
  const uint8_t *first;                  // [tokens]

  struct At {
    vf R, I, g, square, size;  // size: the root, or 1 at a first token
  };
  At at(int64_t t, int64_t h, int64_t c, int m) const {
    const int64_t channel = h * n + c;
    At a;
    a.R = ev::sigmoid(load(r + t * r_token + h * r_head + c, m) + load(r_bias + channel, m));
    a.I = ev::sigmoid(load(i + t * i_token + h * i_head + c, m) + load(i_bias + channel, m));
    a.g = load(decay + channel, m) * a.R;
    a.square = one_minus_exp(2.0f * a.g);
    a.size = first[t] ? splat(1.0f) : root(a.square);
    return a;
  }

  // run(h, c, m) for all channels of a token.
  template <class F>
  void channels(F run) const {
    for (int64_t h = 0; h < heads; h++) {
      int64_t c = 0;
      for (; c + W <= n; c += W) run(h, c, W);
      if (c < n) run(h, c, int(n - c));
    }
  }

  void forward(float *g, float *b, int64_t threads) const {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tokens; t++)
      channels([&](int64_t h, int64_t c, int m) EV_BOTH {
        const int64_t to = (t * heads + h) * n + c;
        __builtin_prefetch(r + (t + 1) * r_token + h * r_head + c);
        __builtin_prefetch(i + (t + 1) * i_token + h * i_head + c);
        const At a = at(t, h, c, m);
        store(g + to, first[t] ? splat(-INFINITY) : a.g, m);
        store(b + to, a.size * a.I * load(x + to, m), m);
      });
  }

  // sums: [parts 3 heads n], the gradients of r_bias, i_bias and decay.
  void backward(const float *gg, const float *gb, T *gx, T *gr, T *gi, float *sums, int64_t parts) const {
    const int64_t N = heads * n;
#pragma omp parallel for schedule(static) num_threads(parts)
    for (int64_t part = 0; part < parts; part++) {
      float *own = sums + part * 3 * N;
      std::memset(own, 0, 3 * N * sizeof(float));
      for (int64_t t = tokens * part / parts; t < tokens * (part + 1) / parts; t++)
        channels([&](int64_t h, int64_t c, int m) EV_BOTH {
          const int64_t to = (t * heads + h) * n + c, channel = h * n + c;
          __builtin_prefetch(r + (t + 1) * r_token + h * r_head + c);
          __builtin_prefetch(i + (t + 1) * i_token + h * i_head + c);
          const At a = at(t, h, c, m);
          const vf in = load(x + to, m), from_b = load(gb + to, m), twice_root = 2.0f * a.size;
          store(gx + to, from_b * a.size * a.I, m);
          const vf slope_i = from_b * a.size * in * a.I * (1.0f - a.I);
          // the root grows with its square, 1 - exp(2 g), by 1 / (2 root); that falls by 2 exp(2 g) as g grows
          const vf steep = from_b * a.I * in / select(twice_root > FLATTEST, twice_root, splat(FLATTEST));
          const vf from_g = first[t] ? vf{} : load(gg + to, m) - steep * 2.0f * (1.0f - a.square);
          const vf slope_r = from_g * load(decay + channel, m) * a.R * (1.0f - a.R);
          store(gr + to, slope_r, m);
          store(gi + to, slope_i, m);
          store(own + channel, load(own + channel, m) + slope_r, m);
          store(own + N + channel, load(own + N + channel, m) + slope_i, m);
          store(own + 2 * N + channel, load(own + 2 * N + channel, m) + from_g * a.R, m);
        });
    }
  }
};

template <class T>
Gates<T> gates(const int64_t *sizes, const void *x, const void *r, const void *i, const float *r_bias,
               const float *i_bias, const float *decay, const uint8_t *first) {
  return {sizes[0], sizes[1], sizes[2], (const T *)x, (const T *)r, (const T *)i, sizes[3], sizes[4], sizes[5],
          sizes[6], r_bias, i_bias, decay, first};
}

}  // namespace

extern "C" {

int64_t ev_rg_lru_gates(int64_t half, int64_t tokens, int64_t heads, int64_t n, const void *x, const void *r,
                     int64_t r_token, int64_t r_head, const void *i, int64_t i_token, int64_t i_head,
                     const float *r_bias, const float *i_bias, const float *decay, const uint8_t *first, float *g,
                     float *b, int64_t threads) {
  return status([&] {
    const int64_t sizes[] = {tokens, heads, n, r_token, r_head, i_token, i_head};
    if (half)
      gates<bf16>(sizes, x, r, i, r_bias, i_bias, decay, first).forward(g, b, threads);
    else
      gates<float>(sizes, x, r, i, r_bias, i_bias, decay, first).forward(g, b, threads);
  });
}

int64_t ev_rg_lru_gates_backward(int64_t half, int64_t tokens, int64_t heads, int64_t n, const void *x, const void *r,
                              int64_t r_token, int64_t r_head, const void *i, int64_t i_token, int64_t i_head,
                              const float *r_bias, const float *i_bias, const float *decay, const uint8_t *first,
                              const float *gg, const float *gb, void *gx, void *gr, void *gi, float *sums,
                              int64_t parts) {
  return status([&] {
    const int64_t sizes[] = {tokens, heads, n, r_token, r_head, i_token, i_head};
    if (half)
      gates<bf16>(sizes, x, r, i, r_bias, i_bias, decay, first)
          .backward(gg, gb, (bf16 *)gx, (bf16 *)gr, (bf16 *)gi, sums, parts);
    else
      gates<float>(sizes, x, r, i, r_bias, i_bias, decay, first)
          .backward(gg, gb, (float *)gx, (float *)gr, (float *)gi, sums, parts);
  });
}

}  // extern "C"

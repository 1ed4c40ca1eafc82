// Instructions on numbers one by one, sums along the last axis, and small products: what a step does beside its ops.
#include <cmath>

#include "instruction.h"

using namespace ev;

namespace {

constexpr int BLOCK = 256;  // numbers along the last axis done at a time

template <class F>
vf lanewise(vf x, F f) {
  for (int i = 0; i < W; i++) x[i] = f(x[i]);
  return x;
}
vf truth(vi mask) { return select(mask, splat(1.0f), vf{}); }
vf tanh(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }
vf accurate_tanh(vf x) {  // near 0 the difference above cancels: an odd polynomial there
  const vf x2 = x * x;
  const vf small = x * (1.0f + x2 * (-0.33333333f + x2 * (0.13333333f - x2 * 0.053968254f)));
  return select((x < 0.1f) & (x > -0.1f), small, tanh(x));
}

// The numbers of the instruction's space, cut into runs along the last axis; f(out, in pointers, length).
template <int N, class F>
void every_run(const Instruction &i, Share share, F f) {
  const int64_t runs = (i.size[3] + BLOCK - 1) / BLOCK, rows = i.size[0] * i.size[1] * i.size[2], all = rows * runs;
  for (int64_t task = share.begin(all); task < share.end(all); task++) {
    const int64_t row = task / runs, from = task % runs * BLOCK;
    const int64_t at[3] = {row / (i.size[1] * i.size[2]), row / i.size[2] % i.size[1], row % i.size[2]};
    const auto place = [&](const Ref &r) {
      return r.at + at[0] * r.stride[0] + at[1] * r.stride[1] + at[2] * r.stride[2] + from * r.stride[3];
    };
    const float *in[N];
    for (int n = 0; n < N; n++) in[n] = place(i.in[n]);
    f(place(i.out), in, i.size[3] - from < BLOCK ? i.size[3] - from : BLOCK);
  }
}

template <int N, class F>
void map(const Instruction &i, Share share, F f) {
  every_run<N>(i, share, [&](float *out, const float **in, int64_t length) {
    for (int64_t k = 0; k < length; k += W) {
      const int n = lanes(length - k);
      vf v[N];
      for (int j = 0; j < N; j++) v[j] = load(in[j] + k * i.in[j].stride[3], i.in[j].stride[3], n);
      store(out + k * i.out.stride[3], i.out.stride[3], f(v), n);
    }
  });
}

// A kind from an expression of x (and y), the inputs, or of a, a number of x.
#define EV_ONE(NAME, EXPRESSION)                                                     \
  {NAME, [](const Instruction &i, Share share, const int64_t *) {                    \
     map<1>(i, share, [](vf *v) { const vf x = v[0]; return vf(EXPRESSION); });      \
   }}
#define EV_EACH(NAME, EXPRESSION) EV_ONE(NAME, lanewise(x, [](float a) { return EXPRESSION; }))
#define EV_TWO(NAME, EXPRESSION)                                                              \
  {NAME, [](const Instruction &i, Share share, const int64_t *) {                             \
     map<2>(i, share, [](vf *v) { const vf x = v[0], y = v[1]; return vf(EXPRESSION); });     \
   }}

vf gelu(vf x) { return lanewise(x, [](float a) { return 0.5f * a * (1 + std::erf(a * 0.70710678f)); }); }
vf elu(vf x) {
  return select(x > 0.0f, x, lanewise(select(x > 0.0f, vf{}, x), [](float a) { return std::expm1(a); }));
}

const Register ones[] = {
    EV_ONE("copy", x),
    EV_ONE("neg", -x),
    EV_ONE("abs", select(x < 0.0f, -x, x)),
    EV_ONE("exp", ev::exp(x)),
    EV_EACH("expm1", std::expm1(a)),
    EV_EACH("log", std::log(a)),
    EV_EACH("log1p", std::log1p(a)),
    EV_EACH("sqrt", std::sqrt(a)),
    EV_EACH("rsqrt", 1.0f / std::sqrt(a)),
    EV_ONE("reciprocal", 1.0f / x),
    EV_ONE("sigmoid", sigmoid(x)),
    EV_ONE("silu", x * sigmoid(x)),
    EV_ONE("tanh", accurate_tanh(x)),
    EV_ONE("gelu", gelu(x)),
    EV_ONE("gelu_tanh", x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x))),
    EV_ONE("relu", select(x < 0.0f, vf{}, x)),  // NaN stays NaN, here and below
    EV_ONE("elu", elu(x)),
    EV_ONE("softplus", softplus(x)),
    EV_ONE("log_sigmoid", -softplus(-x)),
    EV_EACH("sin", std::sin(a)),
    EV_EACH("cos", std::cos(a)),
    EV_ONE("not", truth(x == 0.0f)),
};

const Register twos[] = {
    EV_TWO("add", x + y),
    EV_TWO("sub", x - y),
    EV_TWO("mul", x * y),
    EV_TWO("div", x / y),
    EV_TWO("maximum", select((x > y) | (x != x), x, y)),
    EV_TWO("minimum", select((x < y) | (x != x), x, y)),
    EV_TWO("lt", truth(x < y)),
    EV_TWO("le", truth(x <= y)),
    EV_TWO("gt", truth(x > y)),
    EV_TWO("ge", truth(x >= y)),
    EV_TWO("eq", truth(x == y)),
    EV_TWO("ne", truth(x != y)),
    EV_TWO("and", x * y),
    EV_TWO("or", select(x > y, x, y)),
};

void power(const Instruction &i, Share share, const int64_t *) {
  const float s = float(i.scalar[0]);
  if (s == 2.0f) return map<1>(i, share, [](vf *v) { return v[0] * v[0]; });
  map<1>(i, share, [s](vf *v) { return lanewise(v[0], [s](float a) { return std::pow(a, s); }); });
}

void clamp(const Instruction &i, Share share, const int64_t *) {
  const vf low = splat(float(i.scalar[0])), high = splat(float(i.scalar[1]));
  map<1>(i, share, [=](vf *v) { return select(v[0] < low, low, select(v[0] > high, high, v[0])); });
}

void where(const Instruction &i, Share share, const int64_t *) {
  map<3>(i, share, [](vf *v) { return select(v[0] != 0.0f, v[1], v[2]); });
}

void addcmul(const Instruction &i, Share share, const int64_t *) {
  map<3>(i, share, [](vf *v) { return v[0] + v[1] * v[2]; });
}

enum Sum { SUM, MEAN, MAX, NORM };

// Along the last axis: SUM, MEAN, MAX, or the NORM (the root of the sum of squares).
template <Sum KIND>
void reduce(const Instruction &i, Share share, const int64_t *) {
  const int64_t rows = i.size[0] * i.size[1] * i.size[2], length = i.size[3];
  for (int64_t row = share.begin(rows); row < share.end(rows); row++) {
    const int64_t at[3] = {row / (i.size[1] * i.size[2]), row / i.size[2] % i.size[1], row % i.size[2]};
    const auto place = [&](const Ref &r) { return r.at + at[0] * r.stride[0] + at[1] * r.stride[1] + at[2] * r.stride[2]; };
    const float *in = place(i.in[0]);
    const int64_t stride = i.in[0].stride[3];
    vf total{};
    float most = -INFINITY;
    for (int64_t k = 0; k < length; k += W) {
      const int n = lanes(length - k);
      const vf v = load(in + k * stride, stride, n);
      if (KIND == MAX)
        for (int j = 0; j < n; j++) most = v[j] > most || std::isnan(v[j]) ? v[j] : most;
      else if (stride == 0 && n < W)
        for (int j = 0; j < n; j++) total[j] += KIND == NORM ? v[j] * v[j] : v[j];
      else
        total += KIND == NORM ? v * v : v;
    }
    const float all = sum(total);
    *place(i.out) = KIND == MAX ? most : KIND == MEAN ? all / float(length) : KIND == NORM ? std::sqrt(all) : all;
  }
}

// out[g, i, j] = sum_k a[g, i, k] b[g, k, j]; size = {G, I, J, K}. Both orders of b run along its dense axis.
void matmul(const Instruction &p, Share share, const int64_t *) {
  const int64_t rows = p.size[0] * p.size[1], J = p.size[2], K = p.size[3];
  const Ref &a = p.in[0], &b = p.in[1];
  for (int64_t row = share.begin(rows); row < share.end(rows); row++) {
    const int64_t g = row / p.size[1], i = row % p.size[1];
    const float *left = a.at + g * a.stride[0] + i * a.stride[1], *right = b.at + g * b.stride[0];
    float *out = p.out.at + g * p.out.stride[0] + i * p.out.stride[1];
    if (b.stride[2] == 1)
      for (int64_t j = 0; j < J; j += W) {
        const int n = lanes(J - j);
        vf total{};
        for (int64_t k = 0; k < K; k++) total += left[k * a.stride[2]] * load(right + k * b.stride[1] + j, n);
        store(out + j * p.out.stride[2], p.out.stride[2], total, n);
      }
    else
      for (int64_t j = 0; j < J; j++) {
        vf total{};
        for (int64_t k = 0; k < K; k += W) {
          const int n = lanes(K - k);
          vf x = load(left + k * a.stride[2], a.stride[2], n), y = load(right + k * b.stride[1] + j * b.stride[2], b.stride[1], n);
          if (n < W && (a.stride[2] == 0 || b.stride[1] == 0))
            for (int l = n; l < W; l++) x[l] = 0;
          total += x * y;
        }
        out[j * p.out.stride[2]] = sum(total);
      }
  }
}

const Register others[] = {
    {"power", power}, {"clamp", clamp}, {"where", where}, {"addcmul", addcmul}, {"matmul", matmul},
    {"sum", reduce<SUM>}, {"mean", reduce<MEAN>}, {"max", reduce<MAX>}, {"norm", reduce<NORM>},
};

}  // namespace

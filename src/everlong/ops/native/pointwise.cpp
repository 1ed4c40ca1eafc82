// Gated products  y = x act(z)  and norms over rows,  y = w (u - mean) / sqrt(mean((u - mean)^2) + eps) + b,  with u = x,
// u = x silu(z), or y multiplied by silu(z). One pass over memory each way; the backward passes start from the inputs.
#include <cmath>
#include <vector>

#include "memory.h"
#include "vec.h"

using namespace ev;

namespace {

enum Activation { SILU, SIGMOID, GELU_TANH, RELU2 };

// act(z) and its slope.
template <int ACT>
inline void activate(vf z, vf &value, vf &slope) {
  if (ACT == RELU2) {
    const vf m = select(z < 0.0f, vf{}, z);
    value = m * m;
    slope = 2.0f * m;
    return;
  }
  const float c = 1.59576912f;  // 2 sqrt(2 / pi): gelu_tanh(z) = z sigmoid(c (z + 0.044715 z^3))
  const vf inner = ACT == GELU_TANH ? c * z * (1.0f + 0.044715f * z * z) : z;
  const vf p = ev::sigmoid(inner), q = p * (1.0f - p);
  value = ACT == SIGMOID ? p : z * p;
  slope = ACT == SIGMOID ? q : p + z * q * (ACT == GELU_TANH ? c * (1.0f + 3 * 0.044715f * z * z) : splat(1.0f));
}

// Rows of n numbers: `group` of them behind one another in memory, then the next group `stride` numbers on.
struct Sizes {
  int64_t groups, group, n;
};
template <class T>
struct Rows {
  T *data;
  int64_t stride;
  T *at(const Sizes &s, int64_t g, int64_t i) const { return data + g * stride + i * s.n; }
  T *ahead(const Sizes &s, int64_t g, int64_t i) const { return at(s, g + 1, i); }  // what to fetch meanwhile
};

// run(c, n) for all lanes of a row: whole vectors first, so that their loop knows n.
template <class F>
inline void lanes(int64_t end, F run) {
  int64_t c = 0;
  for (; c + W <= end; c += W) run(c, W);
  if (c < end) run(c, int(end - c));
}

inline void add(float *sum, vf v, int n) { store(sum, load(sum, n) + v, n); }

template <class X, class Z, int ACT>
void gate(Sizes s, Rows<const X> x, Rows<const Z> z, Z *y, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t g = 0; g < s.groups; g++)
    for (int64_t i = 0; i < s.group; i++) {
      const X *from = x.at(s, g, i), *x_next = x.ahead(s, g, i);
      const Z *by = z.at(s, g, i), *z_next = z.ahead(s, g, i);
      Z *to = y + (g * s.group + i) * s.n;
      lanes(s.n, [&](int64_t c, int m) EV_BOTH {
        __builtin_prefetch(x_next + c);
        __builtin_prefetch(z_next + c);
        vf value, slope;
        activate<ACT>(load(by + c, m), value, slope);
        store(to + c, load(from + c, m) * value, m);
      });
    }
}

template <class X, class Z, int ACT>
void gate_backward(Sizes s, Rows<const X> x, Rows<const Z> z, const Z *gy, X *gx, Z *gz, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t g = 0; g < s.groups; g++)
    for (int64_t i = 0; i < s.group; i++) {
      const X *from = x.at(s, g, i), *x_next = x.ahead(s, g, i);
      const Z *by = z.at(s, g, i), *z_next = z.ahead(s, g, i);
      const int64_t row = (g * s.group + i) * s.n;
      lanes(s.n, [&](int64_t c, int m) EV_BOTH {
        __builtin_prefetch(x_next + c);
        __builtin_prefetch(z_next + c);
        vf value, slope;
        activate<ACT>(load(by + c, m), value, slope);
        const vf slant = load(gy + row + c, m);
        store(gx + row + c, slant * value, m);
        store(gz + row + c, slant * load(from + c, m) * slope, m);
      });
    }
}

enum Order { PLAIN, GATE_FIRST, GATE_LAST };

// X: the dtype of x, z and their gradients; Y: that of y and its gradient.
template <class X, class Y, int ORDER>
struct Norm {
  Sizes s;
  int64_t period;  // weight and bias are [period], a multiple of n, repeated along the rows
  Rows<const X> x, z;
  const float *weight, *bias;  // or null
  float eps;
  bool center;

  // u of a row (in the cache) and what it is normalised by.
  void read(int64_t g, int64_t i, float *u, float &mean, float &scale) const {
    const int64_t n = s.n;
    const X *from = x.at(s, g, i), *x_next = x.ahead(s, g, i);
    const X *by = ORDER == PLAIN ? nullptr : z.at(s, g, i), *z_next = ORDER == PLAIN ? nullptr : z.ahead(s, g, i);
    vf sum{}, squares{};
    lanes(n, [&](int64_t c, int m) EV_BOTH {
      __builtin_prefetch(x_next + c);
      if (ORDER != PLAIN) __builtin_prefetch(z_next + c);
      vf v = load(from + c, m);
      if (ORDER == GATE_FIRST) {
        const vf gate = load(by + c, m);
        v *= gate * ev::sigmoid(gate);
      }
      store(u + c, v, m);
      sum += v;
      squares += v * v;
    });
    mean = center ? ev::sum(sum) / n : 0.0f;
    if (center) {  // squares of what is left: the difference of the two sums would cancel
      squares = vf{};
      lanes(n, [&](int64_t c, int m) EV_BOTH {
        const vf v = load(u + c, m) - mean;
        squares += m == W ? v * v : first(v * v, m);
      });
    }
    scale = 1.0f / std::sqrt(ev::sum(squares) / n + eps);
  }
  static vf first(vf v, int m) {
    for (int i = m; i < W; i++) v[i] = 0.0f;
    return v;
  }

  void forward(Y *y, int64_t threads) const {
    Attempts memory;
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> u;
      memory.attempt([&] { u.resize(s.n); });
#pragma omp for schedule(static)
      for (int64_t g = 0; g < s.groups; g++) memory.attempt([&] { group_forward(g, y, u.data()); });
    }
    memory.check();
  }

  void group_forward(int64_t g, Y *y, float *u) const {
    int64_t row = g * s.group * s.n, offset = row % period;
    for (int64_t i = 0; i < s.group; i++, row += s.n) {
      row_forward(g, i, offset, y + row, u);
      offset = offset + s.n < period ? offset + s.n : 0;
    }
  }

  void row_forward(int64_t g, int64_t i, int64_t offset, Y *y, float *u) const {
    float mean, scale;
    read(g, i, u, mean, scale);
    const X *by = ORDER == GATE_LAST ? z.at(s, g, i) : nullptr;
    lanes(s.n, [&](int64_t c, int m) EV_BOTH {
      vf v = (load(u + c, m) - mean) * scale;
      if (weight) v *= load(weight + offset + c, m);
      if (bias) v += load(bias + offset + c, m);
      if (ORDER == GATE_LAST) {
        const vf gate = load(by + c, m);
        v *= gate * ev::sigmoid(gate);
      }
      store(y + c, v, m);
    });
  }

  // gweight, gbias: [parts period], summed by the caller.
  void backward(const Y *gy, X *gx, X *gz, float *gweight, float *gbias, int64_t parts) const {
    Attempts memory;
#pragma omp parallel for schedule(static) num_threads(parts)
    for (int64_t part = 0; part < parts; part++)
      memory.attempt([&] {
        const int64_t from = s.groups * part / parts, to = s.groups * (part + 1) / parts;
        groups_backward(from, to, gy, gx, gz, gweight + part * period, gbias + part * period);
      });
    memory.check();
  }

  void groups_backward(int64_t from, int64_t to, const Y *gy, X *gx, X *gz, float *gw, float *gb) const {
    std::vector<float> u(s.n), h(s.n);
    std::memset(gw, 0, period * sizeof(float));
    std::memset(gb, 0, period * sizeof(float));
    for (int64_t g = from; g < to; g++) {
      int64_t row = g * s.group * s.n, offset = row % period;
      for (int64_t i = 0; i < s.group; i++, row += s.n) {
        row_backward(g, i, offset, gy + row, gx + row, gz + row, gw + offset, gb + offset, u.data(), h.data());
        offset = offset + s.n < period ? offset + s.n : 0;
      }
    }
  }

  void row_backward(int64_t g, int64_t i, int64_t offset, const Y *gy, X *gx, X *gz, float *gw, float *gb, float *u,
                    float *h) const {
    const int64_t n = s.n;
    float mean, scale;
    read(g, i, u, mean, scale);
    const X *by = ORDER == PLAIN ? nullptr : z.at(s, g, i), *from = x.at(s, g, i);
    vf sum{}, along{};
    lanes(n, [&](int64_t c, int m) EV_BOTH {
      const vf unit = (load(u + c, m) - mean) * scale, w = weight ? load(weight + offset + c, m) : splat(1.0f);
      vf g = load(gy + c, m);
      if (ORDER == GATE_LAST) {
        vf value, slope;
        activate<SILU>(load(by + c, m), value, slope);
        store(gz + c, g * slope * (bias ? unit * w + load(bias + offset + c, m) : unit * w), m);
        g *= value;
      }
      if (weight) add(gw + c, g * unit, m);
      if (bias) add(gb + c, g, m);
      store(u + c, unit, m);
      g *= w;
      store(h + c, g, m);
      sum += g;  // 0 in lanes beyond m, where g is
      along += g * unit;
    });
    const float shift = center ? ev::sum(sum) / n : 0.0f, slant = ev::sum(along) / n;
    lanes(n, [&](int64_t c, int m) EV_BOTH {
      const vf g = scale * (load(h + c, m) - shift - load(u + c, m) * slant);
      if (ORDER == GATE_FIRST) {
        vf value, slope;
        activate<SILU>(load(by + c, m), value, slope);
        store(gx + c, g * value, m);
        store(gz + c, g * load(from + c, m) * slope, m);
      } else {
        store(gx + c, g, m);
      }
    });
  }
};

template <class X, class Z>
void gate_any(int64_t act, Sizes s, Rows<const X> x, Rows<const Z> z, Z *y, int64_t threads) {
  auto run = act == SILU        ? gate<X, Z, SILU>
             : act == SIGMOID   ? gate<X, Z, SIGMOID>
             : act == GELU_TANH ? gate<X, Z, GELU_TANH>
                                : gate<X, Z, RELU2>;
  run(s, x, z, y, threads);
}

template <class X, class Z>
void gate_backward_any(int64_t act, Sizes s, Rows<const X> x, Rows<const Z> z, const Z *gy, X *gx, Z *gz,
                       int64_t threads) {
  auto run = act == SILU        ? gate_backward<X, Z, SILU>
             : act == SIGMOID   ? gate_backward<X, Z, SIGMOID>
             : act == GELU_TANH ? gate_backward<X, Z, GELU_TANH>
                                : gate_backward<X, Z, RELU2>;
  run(s, x, z, gy, gx, gz, threads);
}

// What enters a norm.
struct In {
  Sizes s;
  int64_t period, x_stride, z_stride;
  const void *x, *z;
  const float *weight, *bias;
  double eps;
  bool center;

  template <class X, class Y, int ORDER>
  Norm<X, Y, ORDER> as() const {
    return {s, period, {(const X *)x, x_stride}, {(const X *)z, z_stride}, weight, bias, float(eps), center};
  }
};

template <class X, class Y>
void norm_forward(int64_t order, const In &in, void *y, int64_t threads) {
  if (order == PLAIN) in.as<X, Y, PLAIN>().forward((Y *)y, threads);
  if (order == GATE_FIRST) in.as<X, Y, GATE_FIRST>().forward((Y *)y, threads);
  if (order == GATE_LAST) in.as<X, Y, GATE_LAST>().forward((Y *)y, threads);
}

template <class X, class Y>
void norm_backward(int64_t order, const In &in, const void *gy, void *gx, void *gz, float *gw, float *gb,
                   int64_t parts) {
  if (order == PLAIN) in.as<X, Y, PLAIN>().backward((const Y *)gy, (X *)gx, (X *)gz, gw, gb, parts);
  if (order == GATE_FIRST) in.as<X, Y, GATE_FIRST>().backward((const Y *)gy, (X *)gx, (X *)gz, gw, gb, parts);
  if (order == GATE_LAST) in.as<X, Y, GATE_LAST>().backward((const Y *)gy, (X *)gx, (X *)gz, gw, gb, parts);
}

}  // namespace

extern "C" {

// x_half, z_half: bf16 or fp32; x in bf16 with z in fp32 is not built.
int64_t ev_gate(int64_t x_half, int64_t z_half, int64_t act, int64_t groups, int64_t group, int64_t n, const void *x,
             int64_t x_stride, const void *z, int64_t z_stride, void *y, int64_t threads) {
  return status([&] {
    const Sizes s{groups, group, n};
    const Rows<const float> fx{(const float *)x, x_stride}, fz{(const float *)z, z_stride};
    const Rows<const bf16> hx{(const bf16 *)x, x_stride}, hz{(const bf16 *)z, z_stride};
    if (x_half)
      gate_any(act, s, hx, hz, (bf16 *)y, threads);
    else if (z_half)
      gate_any(act, s, fx, hz, (bf16 *)y, threads);
    else
      gate_any(act, s, fx, fz, (float *)y, threads);
  });
}

int64_t ev_gate_backward(int64_t x_half, int64_t z_half, int64_t act, int64_t groups, int64_t group, int64_t n,
                      const void *x, int64_t x_stride, const void *z, int64_t z_stride, const void *gy, void *gx,
                      void *gz, int64_t threads) {
  return status([&] {
    const Sizes s{groups, group, n};
    const Rows<const float> fx{(const float *)x, x_stride}, fz{(const float *)z, z_stride};
    const Rows<const bf16> hx{(const bf16 *)x, x_stride}, hz{(const bf16 *)z, z_stride};
    if (x_half)
      gate_backward_any(act, s, hx, hz, (const bf16 *)gy, (bf16 *)gx, (bf16 *)gz, threads);
    else if (z_half)
      gate_backward_any(act, s, fx, hz, (const bf16 *)gy, (float *)gx, (bf16 *)gz, threads);
    else
      gate_backward_any(act, s, fx, fz, (const float *)gy, (float *)gx, (float *)gz, threads);
  });
}

// x (and z) in bf16 with y in fp32 is not built.
int64_t ev_norm(int64_t x_half, int64_t y_half, int64_t order, int64_t center, double eps, int64_t period, int64_t groups,
             int64_t group, int64_t n, const void *x, int64_t x_stride, const void *z, int64_t z_stride,
             const float *weight, const float *bias, void *y, int64_t threads) {
  return status([&] {
    const In in{{groups, group, n}, period, x_stride, z_stride, x, z, weight, bias, eps, center != 0};
    auto run = x_half ? norm_forward<bf16, bf16> : y_half ? norm_forward<float, bf16> : norm_forward<float, float>;
    run(order, in, y, threads);
  });
}

int64_t ev_norm_backward(int64_t x_half, int64_t y_half, int64_t order, int64_t center, double eps, int64_t period,
                      int64_t groups, int64_t group, int64_t n, const void *x, int64_t x_stride, const void *z,
                      int64_t z_stride, const float *weight, const float *bias, const void *gy, void *gx, void *gz,
                      float *gw, float *gb, int64_t parts) {
  return status([&] {
    const In in{{groups, group, n}, period, x_stride, z_stride, x, z, weight, bias, eps, center != 0};
    auto run = x_half ? norm_backward<bf16, bf16> : y_half ? norm_backward<float, bf16> : norm_backward<float, float>;
    run(order, in, gy, gx, gz, gw, gb, parts);
  });
}

}  // extern "C"

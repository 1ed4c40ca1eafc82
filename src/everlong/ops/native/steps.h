// One token of the recurrences, in place on a state that one owner holds: the steps of ops/*.py, fused.
// Every function does rows or (row, head) pairs begin..end, so that any number of threads can share the work.
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

// y = bias + sum_j weight_j window_j over the last W inputs, with SiLU where `silu`; the window moves on by one.
// weight [W C], state [B W-1 C]; channels begin..end of row b.
inline void conv_step(int64_t b, int64_t begin, int64_t end, int64_t channels, int64_t width, bool silu, const Ref &x,
                      const float *weight, const float *bias, float *state, const Ref &y) {
  float *window = state + b * (width - 1) * channels;
  for (int64_t c = begin; c < end; c += W) {
    const int n = lanes(end - c);
    vf sum = bias ? load(bias + c, n) : vf{};
    for (int64_t j = 0; j + 1 < width; j++) {
      const vf old = load(window + j * channels + c, n);
      sum += old * load(weight + j * channels + c, n);
      if (j) store(window + (j - 1) * channels + c, old, n);
    }
    const vf in = load(x.at + b * x.stride[0] + c * x.stride[1], x.stride[1], n);
    sum += in * load(weight + (width - 1) * channels + c, n);
    if (width > 1) store(window + (width - 2) * channels + c, in, n);
    store(y.at + b * y.stride[0] + c * y.stride[1], y.stride[1], silu ? sum * sigmoid(sum) : sum, n);
  }
}

// Mamba: h = exp(dt A) h + dt x B^T, y = h C + D x for channels begin..end of row b; A [C K], state [B C K].
// B and C are contiguous along K.
inline void scan_step(int64_t b, int64_t begin, int64_t end, int64_t channels, int64_t keys, const Ref &x, const Ref &dt,
                      const Ref &B, const Ref &C, const float *A, const float *D, float *state, const Ref &y) {
  const float *in_b = B.at + b * B.stride[0], *out_c = C.at + b * C.stride[0];
  for (int64_t c = begin; c < end; c++) {
    const float value = x.at[b * x.stride[0] + c * x.stride[1]], step = dt.at[b * dt.stride[0] + c * dt.stride[1]];
    float *h = state + (b * channels + c) * keys;
    vf total{};
    for (int64_t k = 0; k < keys; k += W) {
      const int n = lanes(keys - k);
      const vf decay = ev::exp(splat(step) * load(A + c * keys + k, n));
      const vf now = decay * load(h + k, n) + (step * value) * load(in_b + k, n);
      store(h + k, now, n);
      total += now * load(out_c + k, n);
    }
    y.at[b * y.stride[0] + c * y.stride[1]] = sum(total) + (D ? D[c] * value : 0.0f);
  }
}

// The decays of one head: exp g once for the head (`gates` 1, the same in all keys), per key (2), or 1 (0).
inline void decays(int64_t gates, const Ref &g, int64_t b, int64_t head, int64_t keys, float *out) {
  for (int64_t k = 0; k < keys; k += W) {
    const int n = lanes(keys - k);
    const float *at = g.at + b * g.stride[0] + head * g.stride[1];
    vf e = splat(1.0f);
    if (gates == 2) e = ev::exp(load(at + k * g.stride[2], g.stride[2], n));
    if (gates == 1) e = ev::exp(splat(*at));
    store(out + k, e, n);
  }
}

// Columns of a head's state are done WIDE vectors at a time: a row of S is then one or a few runs of memory, read in order.
constexpr int WIDE = 4;

// f(first column, number of vectors as a type), in blocks of WIDE vectors and then one by one.
template <class F>
inline void every_columns(int64_t values, F f) {
  int64_t c = 0;
  for (; c + WIDE * W <= values; c += WIDE * W) f(c, std::integral_constant<int, WIDE>());
  for (; c < values; c += W) f(c, std::integral_constant<int, 1>());
}

// Linear attention: S = diag(e) S + k v^T, y = S^T q, or with a bonus y = (S_old + diag(u) k v^T)^T q. One head.
struct Attend {
  int64_t heads, groups, keys, values, gates;
  Ref q, k, v, g, bonus, y;
  float *state;
};
template <int N>
inline void attend_columns(const Attend &p, int64_t b, int64_t head, int64_t c, const float *decay) {
  const int64_t group = head / (p.heads / p.groups);
  const float *q = p.q.at + b * p.q.stride[0] + group * p.q.stride[1];
  const float *k = p.k.at + b * p.k.stride[0] + group * p.k.stride[1];
  const float *from = p.v.at + b * p.v.stride[0] + head * p.v.stride[1] + c * p.v.stride[2];
  float *to = p.y.at + b * p.y.stride[0] + head * p.y.stride[1] + c * p.y.stride[2];
  float *S = p.state + (b * p.heads + head) * p.keys * p.values + c;
  const int n = N == 1 ? lanes(p.values - c) : W;
  vf v[N], y[N] = {};
  for (int j = 0; j < N; j++) v[j] = load(from + j * W * p.v.stride[2], p.v.stride[2], n);
  for (int64_t i = 0; i < p.keys; i++, S += p.values) {
    const float key = k[i * p.k.stride[2]], query = q[i * p.q.stride[2]];
    const float more = p.bonus.at ? p.bonus.at[head * p.keys + i] * key : 0.0f;
    for (int j = 0; j < N; j++) {
      const vf old = load(S + j * W, n), now = decay[i] * old + key * v[j];
      store(S + j * W, now, n);
      y[j] += query * (p.bonus.at ? old + more * v[j] : now);
    }
  }
  for (int j = 0; j < N; j++) store(to + j * W * p.y.stride[2], p.y.stride[2], y[j], n);
}
inline void attend_step(const Attend &p, int64_t b, int64_t head, float *decay) {
  decays(p.gates, p.g, b, head, p.keys, decay);
  every_columns(p.values, [&](int64_t c, auto n) { attend_columns<decltype(n)::value>(p, b, head, c, decay); });
}

// Delta rule: u = S^T a, S = diag(e) S + b u^T + k v^T (without b: k (v + u)^T), y = S^T q. One head.
struct Delta {
  int64_t heads, keys, values, gates;
  Ref q, k, v, a, b, g, y;
  float *state;
};
template <int N>
inline void delta_columns(const Delta &p, int64_t row, int64_t head, int64_t c, const float *decay) {
  const auto at = [&](const Ref &r) { return r.at ? r.at + row * r.stride[0] + head * r.stride[1] : nullptr; };
  const float *q = at(p.q), *k = at(p.k), *a = at(p.a), *b = at(p.b);
  float *first = p.state + (row * p.heads + head) * p.keys * p.values + c, *S = first;
  const int n = N == 1 ? lanes(p.values - c) : W;
  vf value[N], read[N] = {}, y[N] = {};
  for (int j = 0; j < N; j++) value[j] = load(at(p.v) + (c + j * W) * p.v.stride[2], p.v.stride[2], n);
  for (int64_t i = 0; i < p.keys; i++, S += p.values)
    for (int j = 0; j < N; j++) read[j] += a[i * p.a.stride[2]] * load(S + j * W, n);
  if (!b)
    for (int j = 0; j < N; j++) value[j] += read[j];
  S = first;
  for (int64_t i = 0; i < p.keys; i++, S += p.values) {
    const float key = k[i * p.k.stride[2]], query = q[i * p.q.stride[2]], other = b ? b[i * p.b.stride[2]] : 0.0f;
    for (int j = 0; j < N; j++) {
      vf now = decay[i] * load(S + j * W, n) + key * value[j];
      if (b) now += other * read[j];
      store(S + j * W, now, n);
      y[j] += query * now;
    }
  }
  for (int j = 0; j < N; j++) store(at(p.y) + (c + j * W) * p.y.stride[2], p.y.stride[2], y[j], n);
}
inline void delta_step(const Delta &p, int64_t row, int64_t head, float *decay) {
  decays(p.gates, p.g, row, head, p.keys, decay);
  every_columns(p.values, [&](int64_t c, auto n) { delta_columns<decltype(n)::value>(p, row, head, c, decay); });
}

}  // namespace ev

// What the steps of linear attention and the delta rule share: the decays of a head, and its state by columns.
#pragma once
#include <vector>

#include "instruction.h"

namespace ev {

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

// f(row, head, room for the decays of its keys) for a share of all heads [B H].
template <class F>
void every_head(int64_t batch, int64_t heads, int64_t keys, Share share, F f) {
  float few[256];
  std::vector<float> many(keys > 256 ? keys : 0);
  const int64_t all = batch * heads;
  for (int64_t task = share.begin(all); task < share.end(all); task++)
    f(task / heads, task % heads, many.empty() ? few : many.data());
}

}  // namespace ev

// One token of softmax attention over the keys and values that one row has kept:  y = softmax(scale q . k_s) v_s.
//
// The slots are cut into parts that depend on how many there are and on nothing else, so a row's result does not depend
// on its batch or on threads. A part reads its slots in memory's order, SLOTS at a time, all heads at each, relative to
// the largest score so far; the parts' sums, each relative to its own largest score, are merged in the order of slots.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vec.h"

namespace ev {

constexpr int64_t SLOTS = 64, PARTS = 32;  // SLOTS: a multiple of every W

// How the first `filled` slots are cut: `count` parts of `size` slots, the last one shorter.
struct Cut {
  int64_t size, count;
};
inline Cut cut(int64_t filled) {
  const int64_t runs = (filled + SLOTS - 1) / SLOTS, each = (runs + PARTS - 1) / PARTS;
  return {each * SLOTS, each ? (runs + each - 1) / each : 0};
}

template <class T>
struct AttentionRow {
  int64_t groups, shared, keys, values;  // `shared` query heads read one head of keys and values
  float scale;
  const float *q;  // head h at q + h q_step, contiguous along K
  int64_t q_step;
  const T *k, *v;  // [S G K], [S G V]

  int64_t heads() const { return groups * shared; }
  // What a part leaves behind: tops [H], sums [H], weighted values [H V]; then the scores that it works on.
  static int64_t result(int64_t heads, int64_t values) { return heads * (2 + values); }
  static int64_t space(int64_t heads, int64_t values) { return result(heads, values) + heads * SLOTS; }

  // scores[j SLOTS] = scale q_j . k for N heads that share k.
  template <int N>
  void dots(const float *heads_q, const T *key, float *scores) const {
    vf sums[N] = {};
    int64_t c = 0;
    for (; c + W <= keys; c += W) {
      const vf part = load(key + c);
      for (int j = 0; j < N; j++) sums[j] += load(heads_q + j * q_step + c) * part;
    }
    if (c < keys)
      for (int j = 0; j < N; j++)
        sums[j] += load(heads_q + j * q_step + c, int(keys - c)) * load(key + c, int(keys - c));
    for (int j = 0; j < N; j++) scores[j * SLOTS] = scale * sum(sums[j]);
  }

  // out[j] += the sum over 4 slots of p[j SLOTS + slot] v for N heads that share v.
  template <int N>
  void weigh(const float *p, const T *const rows[4], float *out) const {
    vf w[N][4];
    for (int j = 0; j < N; j++)
      for (int s = 0; s < 4; s++) w[j][s] = splat(p[j * SLOTS + s]);
    for (int64_t i = 0; i < values; i += W) {
      const int n = values - i < W ? int(values - i) : W;
      const vf a = load(rows[0] + i, n), b = load(rows[1] + i, n), c = load(rows[2] + i, n), d = load(rows[3] + i, n);
      for (int j = 0; j < N; j++) {
        float *to = out + j * values + i;
        store(to, load(to, n) + w[j][0] * a + w[j][1] * b + w[j][2] * c + w[j][3] * d, n);
      }
    }
  }

  void score(int64_t begin, int64_t count, float *scores) const {
    for (int64_t i = 0; i < count; i++) {
      const T *row = k + (begin + i) * groups * keys;
      for (int64_t g = 0; g < groups; g++, row += keys) {
        int64_t h = g * shared;
        for (; h + 4 <= (g + 1) * shared; h += 4) dots<4>(q + h * q_step, row, scores + h * SLOTS + i);
        for (; h < (g + 1) * shared; h++) dots<1>(q + h * q_step, row, scores + h * SLOTS + i);
      }
    }
  }

  // Scores become exp(score - top); what was summed so far moves to the new top.
  void soften(int64_t count, float *scores, float *tops, float *sums, float *sum) const {
    for (int64_t h = 0; h < heads(); h++) {
      float *s = scores + h * SLOTS;
      const int64_t whole = (count + W - 1) / W * W;
      std::fill(s + count, s + whole, -INFINITY);
      float top = tops[h];
      for (int64_t i = 0; i < count; i++) top = std::max(top, s[i]);
      if (top > tops[h]) {
        const float less = ev::exp(splat(tops[h] - top))[0];  // 0 for the first slots
        for (int64_t i = 0; i < values; i++) sum[h * values + i] *= less;
        sums[h] *= less;
        tops[h] = top;
      }
      vf total{};
      for (int64_t i = 0; i < whole; i += W) {
        const vf e = ev::exp(load(s + i) - top);
        store(s + i, e);
        total += e;
      }
      sums[h] += ev::sum(total);
    }
  }

  void add(int64_t begin, int64_t count, const float *scores, float *sum) const {
    for (int64_t i = 0; i < count; i += 4) {
      const T *rows[4];
      for (int64_t j = 0; j < 4; j++) rows[j] = v + (begin + std::min(i + j, count - 1)) * groups * values;
      for (int64_t g = 0; g < groups; g++) {
        int64_t h = g * shared;
        for (; h + 4 <= (g + 1) * shared; h += 4) weigh<4>(scores + h * SLOTS + i, rows, sum + h * values);
        for (; h < (g + 1) * shared; h++) weigh<1>(scores + h * SLOTS + i, rows, sum + h * values);
        for (auto &row : rows) row += values;
      }
    }
  }

  // Slots `begin` to `end`, in `space` numbers at `out`.
  void part(int64_t begin, int64_t end, float *out) const {
    const int64_t H = heads();
    float *tops = out, *sums = out + H, *sum = out + 2 * H, *scores = out + result(H, values);
    std::fill(tops, tops + H, -INFINITY);
    std::fill(sums, scores, 0.0f);
    for (int64_t s = begin; s < end; s += SLOTS) {
      const int64_t count = std::min(SLOTS, end - s);
      score(s, count, scores);
      soften(count, scores, tops, sums, sum);
      add(s, count, scores, sum);
    }
  }

  // y of one head from `count` parts that lie `step` numbers apart; NaN in a score makes NaN.
  static void merge(const float *parts, int64_t count, int64_t step, int64_t heads, int64_t values, int64_t h, float *y,
                    int64_t y_step) {
    float top = parts[h], total = 0;
    for (int64_t i = 1; i < count; i++) top = std::max(top, parts[i * step + h]);
    for (int64_t c = 0; c < values; c++) y[c * y_step] = 0.0f;
    for (int64_t i = 0; i < count; i++) {
      const float *part = parts + i * step, less = std::exp(part[h] - top);
      total += less * part[heads + h];
      for (int64_t c = 0; c < values; c++) y[c * y_step] += less * part[2 * heads + h * values + c];
    }
    for (int64_t c = 0; c < values; c++) y[c * y_step] /= total;
  }
};

}  // namespace ev

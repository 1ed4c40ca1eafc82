// One token of softmax attention over the keys and values that one row has kept:  y = softmax(scale q . k_s) v_s.
//
// The slots are cut into parts that depend on how many there are and on nothing else, so a row's result does not depend
// on its batch or on threads. A part reads its slots in memory's order, SLOTS at a time, all heads at each, relative to
// the largest score so far; the parts' sums, each relative to its own largest score, are merged in the order of slots.
//
// Keys and values are taken a unit of 2 W numbers at a time, as two vectors: for bf16 the even and the odd numbers, which
// two instructions widen. Queries and sums lie in the same order.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vec.h"

namespace ev {

constexpr int64_t SLOTS = 64, PARTS = 16, UNIT = 2 * W;  // SLOTS: a multiple of every W

// How the first `filled` slots are cut: `count` parts of `size` slots, the last one shorter; PARTS at most.
struct Cut {
  int64_t size, count;
};
inline Cut cut(int64_t filled) {
  const int64_t runs = (filled + SLOTS - 1) / SLOTS, each = (runs + PARTS - 1) / PARTS;
  return {each * SLOTS, each ? (runs + each - 1) / each : 0};
}

struct Two {
  vf first, second;
};
inline Two unit(const float *p) { return {load(p), load(p + W)}; }
inline Two unit(const bf16 *p) {
  vu both;
  std::memcpy(&both, p, sizeof both);
  return {(vf)(both << 16), (vf)(both & 0xffff0000u)};
}
template <class T>
inline Two unit(const T *p, int64_t n) {  // the first n numbers, zeros behind them
  if (n >= UNIT) return unit(p);
  T full[UNIT] = {};
  std::memcpy(full, p, n * sizeof(T));
  return unit(full);
}
// Where number i of a unit lies in the two vectors.
inline int64_t place(const float *, int64_t i) { return i; }
inline int64_t place(const bf16 *, int64_t i) { return i / 2 + i % 2 * W; }

// The sums of four vectors, in the first four lanes.
template <int N>
struct Fold {
  typedef float type __attribute__((vector_size(4 * N)));
  typedef float four __attribute__((vector_size(16)));
  static four fold(type v) {
    typename Fold<N / 2>::type low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, (const char *)&v + sizeof low, sizeof high);
    return Fold<N / 2>::fold(low + high);
  }
};
template <>
struct Fold<4> {
  typedef float type __attribute__((vector_size(16)));
  static type fold(type v) { return v; }
};

template <class T>
struct AttentionRow {
  int64_t groups, shared, keys, values;  // `shared` query heads read one head of keys and values
  float scale;
  const float *q;  // head h at q + h q_step, contiguous along K
  int64_t q_step;
  const T *k, *v;  // [S G K], [S G V]

  static int64_t padded(int64_t n) { return (n + UNIT - 1) / UNIT * UNIT; }
  int64_t heads() const { return groups * shared; }
  // What a part leaves behind: tops [H], sums [H], weighted values [H V]; then scores and queries that it works on.
  static int64_t result(int64_t heads, int64_t values) { return heads * (2 + padded(values)); }
  static int64_t space(int64_t heads, int64_t keys, int64_t values) {
    return result(heads, values) + heads * (SLOTS + padded(keys));
  }

  // Lines 24 KiB behind those that are read now, into the second cache: what the hardware fetches by itself is too little
  // for rows that are read in pieces, head by head.
  static void fetch(const T *from, int64_t numbers) {
    for (int64_t i = 0; i < numbers; i += 64 / int64_t(sizeof(T))) __builtin_prefetch((const char *)(from + i) + (24 << 10), 0, 2);
  }

  // The queries of all heads in the order of units, scaled.
  void order(float *to) const {
    const int64_t wide = padded(keys);
    for (int64_t h = 0; h < heads(); h++)
      for (int64_t c = 0; c < wide; c++)
        to[h * wide + c / UNIT * UNIT + place((const T *)nullptr, c % UNIT)] = c < keys ? scale * q[h * q_step + c] : 0.0f;
  }

  // scores[s] = q . k_s of 4 slots that lie `step` apart, of one head.
  template <int KEYS>  // or 0: any
  void dots(const float *query, const T *key, int64_t step, float *scores) const {
    const int64_t keys = KEYS ? KEYS : this->keys;
    vf a[4] = {}, b[4] = {};
    for (int64_t c = 0; c < keys; c += UNIT) {
      const vf x = load(query + c), y = load(query + c + W);
      for (int s = 0; s < 4; s++) {
        const Two t = unit(key + s * step + c, keys - c);
        a[s] += x * t.first;
        b[s] += y * t.second;
      }
    }
    const auto four = Fold<W>::fold(quarters(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]));
    std::memcpy(scores, &four, sizeof four);
  }

  using Dots = void (AttentionRow::*)(const float *, const T *, int64_t, float *) const;
  Dots dots_of() const {
    return keys == 64 ? &AttentionRow::dots<64> : keys == 128 ? &AttentionRow::dots<128> : &AttentionRow::dots<0>;
  }

  // Scores of `count` slots; where fewer than 4 are left, the last one stands for those that are not there.
  void score(int64_t begin, int64_t count, const float *queries, float *scores) const {
    const int64_t step = groups * keys, wide = padded(keys);
    const Dots dots = dots_of();
    for (int64_t i = 0; i < count; i += 4) {
      const T *row = k + (begin + i) * step;
      fetch(row, 4 * step);
      if (i + 4 <= count) {
        for (int64_t h = 0; h < heads(); h++)
          (this->*dots)(queries + h * wide, row + h / shared * keys, step, scores + h * SLOTS + i);
        continue;
      }
      for (int64_t s = 0; s < count - i; s++)
        for (int64_t h = 0; h < heads(); h++) {
          float same[4];
          (this->*dots)(queries + h * wide, row + s * step + h / shared * keys, 0, same);
          scores[h * SLOTS + i + s] = same[0];
        }
    }
  }

  // Scores become exp(score - top); what was summed so far moves to the new top.
  void soften(int64_t count, float *scores, float *tops, float *sums, float *sum) const {
    const int64_t wide = padded(values), whole = (count + W - 1) / W * W;
    for (int64_t h = 0; h < heads(); h++) {
      float *s = scores + h * SLOTS;
      std::fill(s + count, s + whole, -INFINITY);
      float top = tops[h];
      for (int64_t i = 0; i < count; i++) top = std::max(top, s[i]);
      if (top > tops[h]) {
        const float less = ev::exp(splat(tops[h] - top))[0];  // 0 for the first slots
        for (int64_t i = 0; i < wide; i++) sum[h * wide + i] *= less;
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

  // sum += p_s v_s over COUNT slots that lie `step` apart, of one head.
  template <int COUNT>
  void weigh(const float *p, const T *value, int64_t step, float *sum) const {
    for (int64_t c = 0; c < values; c += UNIT) {
      vf a = load(sum + c), b = load(sum + c + W);
      for (int s = 0; s < COUNT; s++) {
        const Two t = unit(value + s * step + c, values - c);
        a += p[s] * t.first;
        b += p[s] * t.second;
      }
      store(sum + c, a);
      store(sum + c + W, b);
    }
  }

  void add(int64_t begin, int64_t count, const float *scores, float *sum) const {
    const int64_t step = groups * values, wide = padded(values);
    for (int64_t i = 0; i < count;) {
      const T *row = v + (begin + i) * step;
      const int64_t size = i + 8 <= count ? 8 : 1;
      fetch(row, size * step);
      for (int64_t h = 0; h < heads(); h++) {
        const float *p = scores + h * SLOTS + i;
        const T *value = row + h / shared * values;
        size == 8 ? weigh<8>(p, value, step, sum + h * wide) : weigh<1>(p, value, step, sum + h * wide);
      }
      i += size;
    }
  }

  // Slots `begin` to `end`, in `space` numbers at `out`.
  void part(int64_t begin, int64_t end, float *out) const {
    const int64_t H = heads();
    float *tops = out, *sums = out + H, *sum = out + 2 * H, *scores = out + result(H, values), *queries = scores + H * SLOTS;
    std::fill(tops, tops + H, -INFINITY);
    std::fill(sums, scores, 0.0f);
    order(queries);
    for (int64_t s = begin; s < end; s += SLOTS) {
      const int64_t count = std::min(SLOTS, end - s);
      score(s, count, queries, scores);
      soften(count, scores, tops, sums, sum);
      add(s, count, scores, sum);
    }
  }

  // y of head h from `count` parts that lie `step` numbers apart.
  static void merge(const float *parts, int64_t count, int64_t step, int64_t heads, int64_t values, int64_t h, float *y,
                    int64_t y_step) {
    float top = parts[h], total = 0, less[PARTS];
    for (int64_t i = 1; i < count; i++) top = std::max(top, parts[i * step + h]);
    for (int64_t i = 0; i < count; i++) {
      less[i] = std::exp(parts[i * step + h] - top);
      total += less[i] * parts[i * step + heads + h];
    }
    for (int64_t c = 0; c < values; c += UNIT) {
      const float *from = parts + 2 * heads + h * padded(values) + c;
      float both[UNIT];
      vf a{}, b{};
      for (int64_t i = 0; i < count; i++) {
        a += less[i] * load(from + i * step);
        b += less[i] * load(from + i * step + W);
      }
      store(both, a / total);
      store(both + W, b / total);
      for (int64_t i = 0; i < std::min(UNIT, values - c); i++) y[(c + i) * y_step] = both[place((const T *)nullptr, i)];
    }
  }
};

}  // namespace ev

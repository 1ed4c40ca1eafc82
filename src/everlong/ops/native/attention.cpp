// One token of softmax attention over a cache, all rows at once (see attention.h). The new key and value are written to
// their slot first.
#include <vector>

#include "attention.h"
#include "instruction.h"
#include "memory.h"

using namespace ev;

namespace {

template <class T>
int64_t decode(int64_t batch, int64_t slots, int64_t groups, int64_t shared, int64_t keys, int64_t values, const float *q,
               const void *new_k, const void *new_v, void *k, void *v, const int64_t *position, float *y, int64_t threads) {
  const int64_t heads = groups * shared, step = AttentionRow<T>::space(heads, keys, values);
  std::vector<Cut> cuts(batch);
  std::vector<int64_t> rows, first(batch + 1);  // of every part: its row; of every row: its first part
  for (int64_t b = 0; b < batch; b++) {
    if (position[b] < 0 || slots < 1) return OUTSIDE;
    const int64_t slot = position[b] % slots;
    std::copy_n((const T *)new_k + b * groups * keys, groups * keys, (T *)k + (b * slots + slot) * groups * keys);
    std::copy_n((const T *)new_v + b * groups * values, groups * values, (T *)v + (b * slots + slot) * groups * values);
    cuts[b] = cut(std::min(position[b] + 1, slots));
    rows.insert(rows.end(), cuts[b].count, b);
    first[b + 1] = int64_t(rows.size());
  }
  std::vector<float> space(rows.size() * step);
  const int64_t count = int64_t(rows.size());
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = rows[i], begin = (i - first[b]) * cuts[b].size, filled = std::min(position[b] + 1, slots);
      const AttentionRow<T> row{groups, shared, keys, values, 1.0f, q + b * heads * keys, keys,
                                (const T *)k + b * slots * groups * keys, (const T *)v + b * slots * groups * values};
      row.part(begin, std::min(begin + cuts[b].size, filled), &space[i * step]);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * heads; task++) {
      const int64_t b = task / heads, h = task % heads;
      AttentionRow<T>::merge(&space[first[b] * step], cuts[b].count, step, heads, values, h,
                             y + (b * heads + h) * values, 1);
    }
  }
  return DONE;
}

}  // namespace

extern "C" int64_t ev_attention_decode(int64_t half, int64_t batch, int64_t slots, int64_t groups, int64_t shared,
                                       int64_t keys, int64_t values, const float *q, const void *new_k, const void *new_v,
                                       void *k, void *v, const int64_t *position, float *y, int64_t threads) {
  auto run = half ? decode<bf16> : decode<float>;
  int64_t result = DONE;
  const int64_t memory = status(
      [&] { result = run(batch, slots, groups, shared, keys, values, q, new_k, new_v, k, v, position, y, threads); });
  return memory == DONE ? result : memory;
}

// Numbers that a step of a program works on, for each row.
extern "C" int64_t ev_attention_space(int64_t heads, int64_t keys, int64_t values) {
  return PARTS * AttentionRow<float>::space(heads, keys, values);
}

// ---- one token in a program ----

namespace {

// Two instructions: parts of all rows, then their sum. The rows' keys and values lie where `k` and `v`
// say, which the new token is written to; `position` [B] counts the tokens before it. A ring has `ring` slots (0: no ring).
template <class T>
struct AttentionStep {
  int64_t batch, groups, shared, keys, values, ring;
  float scale;
  Ref q, new_k, new_v, y;
  const int64_t *position;
  T *const *k, *const *v;
  float *space;

  int64_t heads() const { return groups * shared; }
  int64_t slot(int64_t b) const { return ring ? position[b] % ring : position[b]; }
  Cut cut_of(int64_t b) const { return cut(ring ? std::min(position[b] + 1, ring) : position[b] + 1); }
  int64_t filled(int64_t b) const { return ring ? std::min(position[b] + 1, ring) : position[b] + 1; }
  int64_t step() const { return AttentionRow<T>::space(heads(), keys, values); }

  static void put(const Ref &from, int64_t b, int64_t width, int64_t groups, T *to) {
    for (int64_t g = 0; g < groups; g++)
      for (int64_t c = 0; c < width; c += W) {
        const int n = lanes(width - c);
        store(to + g * width + c, load(from.at + b * from.stride[0] + g * from.stride[1] + c * from.stride[2], from.stride[2], n), n);
      }
  }

  // Part `p` of row b.
  void part(int64_t b, int64_t p) const {
    const Cut c = cut_of(b);
    const int64_t begin = p * c.size, end = std::min(begin + c.size, filled(b)), at = slot(b);
    if (begin <= at && at < end) {
      put(new_k, b, keys, groups, k[b] + at * groups * keys);
      put(new_v, b, values, groups, v[b] + at * groups * values);
    }
    const AttentionRow<T> row{groups, shared, keys, values, scale, q.at + b * q.stride[0], q.stride[1], k[b], v[b]};
    row.part(begin, end, space + (b * PARTS + p) * step());
  }

  // Tasks begin..end of all parts of all rows, from `all` in total.
  int64_t tasks() const {
    int64_t all = 0;
    for (int64_t b = 0; b < batch; b++) all += cut_of(b).count;
    return all;
  }
  void parts(int64_t begin, int64_t end) const {
    for (int64_t b = 0, first = 0; b < batch && first < end; b++) {
      const int64_t count = cut_of(b).count;
      for (int64_t p = std::max<int64_t>(begin - first, 0); p < std::min(count, end - first); p++) part(b, p);
      first += count;
    }
  }

  // Heads begin..end of all rows.
  void merge(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / heads(), h = task % heads();
      AttentionRow<T>::merge(space + b * PARTS * step(), cut_of(b).count, step(), heads(), values, h,
                             y.at + b * y.stride[0] + h * y.stride[1], y.stride[2]);
    }
  }
};

template <class T>
AttentionStep<T> attention(const Instruction &i) {
  const int64_t groups = i.number[0];
  return {i.size[0], groups, i.size[1] / groups, i.size[2], i.size[3], i.number[1], float(i.scalar[0]), i.in[0], i.in[1],
          i.in[2], i.out, (const int64_t *)i.in[3].at, (T *const *)i.in[4].at, (T *const *)i.in[5].at, i.in[6].at};
}
template <class T>
void attention_parts(const Instruction &i, Share share, const int64_t *) {
  const AttentionStep<T> step = attention<T>(i);
  const int64_t all = step.tasks();
  step.parts(share.begin(all), share.end(all));
}
template <class T>
void attention_merge(const Instruction &i, Share share, const int64_t *) {
  const AttentionStep<T> step = attention<T>(i);
  const int64_t all = step.batch * step.heads();
  step.merge(share.begin(all), share.end(all));
}

const Register kinds[] = {{"slots", attention_parts<float>}, {"slots of bf16", attention_parts<bf16>},
                          {"merge", attention_merge<float>}, {"merge of bf16", attention_merge<bf16>}};

}  // namespace

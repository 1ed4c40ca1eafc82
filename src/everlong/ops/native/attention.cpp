// One token of softmax attention over a cache, all rows at once (see attention.h). The new key and value are written to
// their slot first.
#include <vector>

#include "attention.h"
#include "memory.h"

using namespace ev;

namespace {

template <class T>
int64_t decode(int64_t batch, int64_t slots, int64_t groups, int64_t shared, int64_t keys, int64_t values, const float *q,
               const void *new_k, const void *new_v, void *k, void *v, const int64_t *position, float *y, int64_t threads) {
  const int64_t heads = groups * shared, step = AttentionRow<T>::space(heads, values);
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
extern "C" int64_t ev_attention_space(int64_t heads, int64_t values) {
  return PARTS * AttentionRow<float>::space(heads, values);
}

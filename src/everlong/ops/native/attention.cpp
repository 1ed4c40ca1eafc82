// One token of softmax attention over a cache:  y = softmax(scale q . k_s) v_s  over the slots a row has filled.
//
// The new key and value are written to their slot first. Slots are read in memory's order, all heads at each, SPLIT
// slots a task; the tasks' sums, each relative to its own largest score, are merged in the order of slots. A row's
// result so depends on its own slots only, whatever the batch and the threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "memory.h"
#include "vec.h"

using namespace ev;

namespace {

constexpr int64_t SPLIT = 256;  // a multiple of every W

struct Task {
  int64_t row, begin, end;
};

template <class T>
struct Decode {
  int64_t batch, slots, groups, shared, keys, values;  // `shared` query heads read one head of keys and values
  const float *q;                                      // [B H K], scaled
  T *k, *v;                                            // [B S G K], [B S G V]
  float *y;                                            // [B H V]

  int64_t heads() const { return groups * shared; }

  // scores[j SPLIT] = q_j . k for N heads that share k.
  template <int N>
  void dots(const float *heads_q, const T *key, float *scores) const {
    vf sums[N] = {};
    int64_t c = 0;
    for (; c + W <= keys; c += W) {
      const vf part = load(key + c);
      for (int j = 0; j < N; j++) sums[j] += load(heads_q + j * keys + c) * part;
    }
    if (c < keys)
      for (int j = 0; j < N; j++)
        sums[j] += load(heads_q + j * keys + c, int(keys - c)) * load(key + c, int(keys - c));
    for (int j = 0; j < N; j++) scores[j * SPLIT] = sum(sums[j]);
  }

  // out[j] += the sum over 4 slots of p[j SPLIT + slot] v for N heads that share v.
  template <int N>
  void weigh(const float *p, const T *const rows[4], float *out) const {
    const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    vf w[N][4];
    for (int j = 0; j < N; j++)
      for (int s = 0; s < 4; s++) w[j][s] = splat(p[j * SPLIT + s]);
    int64_t i = 0;
    for (; i + W <= values; i += W) {
      const vf va = load(a + i), vb = load(b + i), vc = load(c + i), vd = load(d + i);
      for (int j = 0; j < N; j++) {
        float *to = out + j * values + i;
        store(to, load(to) + w[j][0] * va + w[j][1] * vb + w[j][2] * vc + w[j][3] * vd);
      }
    }
    if (i == values) return;
    const int n = int(values - i);
    const vf va = load(a + i, n), vb = load(b + i, n), vc = load(c + i, n), vd = load(d + i, n);
    for (int j = 0; j < N; j++) {
      float *to = out + j * values + i;
      store(to, load(to, n) + w[j][0] * va + w[j][1] * vb + w[j][2] * vc + w[j][3] * vd, n);
    }
  }

  // Scores [H SPLIT] of a task's slots become exp(score - top); the sum and top of each head.
  void soften(float *scores, float *tops, float *sums) const {
    for (int64_t h = 0; h < heads(); h++) {
      float *s = scores + h * SPLIT;
      vf most = load(s), sum{};
      for (int64_t i = W; i < SPLIT; i += W) most = select(load(s + i) > most, load(s + i), most);
      float top = most[0];
      for (int i = 1; i < W; i++) top = std::max(top, float(most[i]));
      for (int64_t i = 0; i < SPLIT; i += W) {
        const vf e = ev::exp(load(s + i) - top);
        store(s + i, e);
        sum += e;
      }
      tops[h] = top;
      sums[h] = ev::sum(sum);
    }
  }

  // out: tops [H], sums [H], weighted values [H V] of one task.
  void part(const Task &t, float *scores, float *out) const {
    const int64_t H = heads(), count = t.end - t.begin;
    for (int64_t h = 0; h < H; h++) std::fill(scores + h * SPLIT + count, scores + (h + 1) * SPLIT, -INFINITY);
    for (int64_t i = 0; i < count; i++) {
      const T *row = k + (t.row * slots + t.begin + i) * groups * keys;
      const float *own = q + t.row * H * keys;
      for (int64_t g = 0; g < groups; g++, row += keys) {
        int64_t h = g * shared;
        for (; h + 4 <= (g + 1) * shared; h += 4) dots<4>(own + h * keys, row, scores + h * SPLIT + i);
        for (; h < (g + 1) * shared; h++) dots<1>(own + h * keys, row, scores + h * SPLIT + i);
      }
    }
    soften(scores, out, out + H);
    float *sum = out + 2 * H;
    std::fill(sum, sum + H * values, 0.0f);
    for (int64_t i = 0; i < count; i += 4) {
      const T *rows[4];
      for (int64_t j = 0; j < 4; j++)
        rows[j] = v + (t.row * slots + t.begin + std::min(i + j, count - 1)) * groups * values;
      for (int64_t g = 0; g < groups; g++) {
        int64_t h = g * shared;
        for (; h + 4 <= (g + 1) * shared; h += 4) weigh<4>(scores + h * SPLIT + i, rows, sum + h * values);
        for (; h < (g + 1) * shared; h++) weigh<1>(scores + h * SPLIT + i, rows, sum + h * values);
        for (auto &row : rows) row += values;
      }
    }
  }

  // The parts of one row, merged.
  void merge(int64_t row, const float *parts, int64_t count, int64_t size) const {
    const int64_t H = heads();
    for (int64_t h = 0; h < H; h++) {
      float top = parts[h], total = 0;
      for (int64_t i = 1; i < count; i++) top = std::max(top, parts[i * size + h]);
      float *out = y + (row * H + h) * values;
      std::fill(out, out + values, 0.0f);
      for (int64_t i = 0; i < count; i++) {
        const float *part = parts + i * size, scale = std::exp(part[h] - top);
        total += scale * part[H + h];
        for (int64_t c = 0; c < values; c++) out[c] += scale * part[2 * H + h * values + c];
      }
      for (int64_t c = 0; c < values; c++) out[c] /= total;
    }
  }

  int64_t run(const T *new_k, const T *new_v, const int64_t *position, int64_t threads) const {
    for (int64_t b = 0; b < batch; b++)
      if (position[b] < 0 || slots < 1) return OUTSIDE;
    Attempts memory;
    std::vector<Task> tasks;
    std::vector<int64_t> first(batch + 1);
    for (int64_t b = 0; b < batch; b++) {
      const int64_t slot = position[b] % slots, filled = std::min(position[b], slots - 1) + 1;
      std::copy_n(new_k + b * groups * keys, groups * keys, k + (b * slots + slot) * groups * keys);
      std::copy_n(new_v + b * groups * values, groups * values, v + (b * slots + slot) * groups * values);
      for (int64_t s = 0; s < filled; s += SPLIT) tasks.push_back({b, s, std::min(s + SPLIT, filled)});
      first[b + 1] = int64_t(tasks.size());
    }
    const int64_t size = heads() * (values + 2), count = int64_t(tasks.size());
    std::vector<float> parts(count * size);
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> scores;
      memory.attempt([&] { scores.resize(heads() * SPLIT); });
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < count; i++)
        memory.attempt([&] { part(tasks[i], scores.data(), &parts[i * size]); });
#pragma omp for schedule(static)
      for (int64_t b = 0; b < batch; b++)
        memory.attempt([&] { merge(b, &parts[first[b] * size], first[b + 1] - first[b], size); });
    }
    memory.check();
    return DONE;
  }
};

template <class T>
int64_t decode(int64_t batch, int64_t slots, int64_t groups, int64_t shared, int64_t keys, int64_t values, const float *q,
            const void *new_k, const void *new_v, void *k, void *v, const int64_t *position, float *y,
            int64_t threads) {
  const Decode<T> task{batch, slots, groups, shared, keys, values, q, (T *)k, (T *)v, y};
  return task.run((const T *)new_k, (const T *)new_v, position, threads);
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

// What a chunk of linear attention is made of, and the gradients of its parts: scores, reads, writes, decay.
#pragma once
#include "heads.h"

namespace ev {

constexpr int C = 16;  // tokens of a chunk

template <class T>
struct Problem : Heads {
  const T *q, *k, *v;
  const float *g, *bonus;  // g [B T H], [B T H K] or null; bonus [H K] or null (it comes with a g per key)
  bool per_key;

  int size(int64_t begin) const { return int(std::min<int64_t>(C, time - begin)); }
};

// One chunk of one head, ready for the products
//     y = scores v + reach (reads S),      S <- diag(keep) S + writes^T (rest v),
// where the decays of a head with one for all keys are in reach and rest [C], else in reads and writes.
struct Chunk {
  int n;
  const float *q, *k, *reads, *writes;
  Buffer scores, between, keep;        // between: the decays of the scores, where one serves all keys
  Buffer d, asked, own_reads, own_writes, u;  // per key: decays [C K]; q where no document starts; the bonus
  float reach[C], rest[C];

  Chunk(int64_t width, bool per_key)
      : scores(C * C), between(C * C), keep(width), d(per_key * C * width), asked(per_key * C * width),
        own_reads(per_key * C * width), own_writes(per_key * C * width), u(per_key * width) {}
};

// One decay per head, or none; `raw` holds the products q_i k_j.
template <class T>
void prepare_per_head(const Problem<T> &p, int64_t b, int64_t h, int64_t begin, const float *raw, Chunk &chunk) {
  const int n = chunk.n;
  alignas(64) float d[C] = {}, row[C] = {};
  for (int i = 0; i < n; i++) d[i] = p.g ? p.g[(b * p.time + begin + i) * p.heads + h] : 0.0f;
  for (int i = 0; i < C; i += W) store(d + i, ev::exp(load(d + i)));
  for (int i = 0; i < n; i++)
    if (p.start(b, begin + i)) d[i] = 0;
  float reach = 1, rest = 1;
  for (int i = 0; i < n; i++) chunk.reach[i] = reach *= d[i];
  for (int i = n - 1; i >= 0; i--) {
    chunk.rest[i] = rest;
    rest *= d[i];
  }
  std::fill_n((float *)chunk.keep, p.width(), reach);
  for (int i = 0; i < n; i++) {
    for (int c = 0; c < C; c += W) store(row + c, load(row + c) * d[i]);
    row[i] = 1;
    for (int c = 0; c < C; c += W) {
      store(chunk.between + i * C + c, load(row + c));
      store(chunk.scores + i * C + c, load(row + c) * load(raw + i * C + c));
    }
  }
}

// The gradients of g [C], and of the raw products, which are added to `raw`. Given are those of scores and keep, and
// what each token's read and write carry, as vectors to be summed.
inline void adjoint_per_head(const Chunk &chunk, int64_t width, const float *slopes, const float *keep, const vf *read,
                             const vf *written, float *raw, float *g) {
  const int n = chunk.n;
  vf crossed[C] = {}, after[C / W] = {}, kept{};
  alignas(64) float reads[C], writes[C], crosses[C];
  vi lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  for (int64_t c = 0; c < width; c += W) kept += load(keep + c) * load(chunk.keep + c);
  for (int i = n - 1; i >= 0; i--)  // the score of i and an earlier token decays by what lies between them
    for (int c = 0; c < C; c += W) {
      const vf slope = load(slopes + i * C + c);
      after[c / W] += slope * load(chunk.scores + i * C + c);
      crossed[i] += select(lane + c < i, after[c / W], vf{});
      store(raw + i * C + c, load(raw + i * C + c) + slope * load(chunk.between + i * C + c));
    }
  sum_each(read, C, reads);
  sum_each(written, C, writes);
  sum_each(crossed, C, crosses);
  float since = 0, until = sum(kept);
  for (int i = n - 1; i >= 0; i--) g[i] = (since += reads[i]) + crosses[i];
  for (int i = 0; i < n; i++) {
    g[i] += until;
    until += writes[i];
  }
}

// scores(i, j) = sum over keys of q_i k_j d_{j+1} ... d_i, for j <= i < readers
inline void scores_per_key(const float *q, const float *k, const float *d, int readers, int64_t width, float *scores) {
  alignas(64) float column[C];
  for (int j = 0; j < readers; j++) {
    vf total[C] = {};
    const auto run = [&](auto kind, int64_t c) {
      auto key = kind.zeros();
      key.load(k + j * width + c, width);
      for (int i = j; i < readers; i++)
        for (int m = 0; m < key.vectors; m++) {
          vf &x = key.x[0][m];
          if (i > j) x *= load(d + i * width + c + m * W);
          total[i] += x * load(q + i * width + c + m * W);
        }
    };
    int64_t c = 0;
    for (; c + 4 * W <= width; c += 4 * W) run(Kind<1, 4>{}, c);
    for (; c < width; c += W) run(Kind<1, 1>{}, c);
    sum_each(total, C, column);
    for (int i = j; i < readers; i++) scores[i * C + j] = column[i];
  }
}

// Adds the gradients that `slopes` of scores_per_key have in q, k and the logs of d.
inline void adjoint_scores_per_key(const float *q, const float *k, const float *d, int readers, int64_t width,
                                   const float *slopes, float *gq, float *gk, float *g) {
  for (int j = 0; j < readers; j++)
    for (int64_t c = 0; c < width; c += W) {
      vf key[C], back{};
      key[j] = load(k + j * width + c);
      for (int i = j + 1; i < readers; i++) key[i] = key[i - 1] * load(d + i * width + c);
      for (int i = readers - 1; i >= j; i--) {
        const int64_t at = i * width + c;
        const float slope = slopes[i * C + j];
        store(gq + at, load(gq + at) + key[i] * slope);
        back += load(q + at) * slope;
        if (i == j) break;
        store(g + at, load(g + at) + back * key[i]);
        back *= load(d + at);
      }
      store(gk + j * width + c, load(gk + j * width + c) + back);
    }
}

// The scores under a bonus: a token reads itself with its own weight. Returns the queries that read what came before.
template <class T>
const float *own_scores(const Problem<T> &p, int64_t b, int64_t h, int64_t begin, Chunk &chunk) {
  const int64_t width = p.width();
  vf own[C] = {};
  alignas(64) float diagonal[C];
  read(Rows<const float>{p.bonus + h * p.keys, 0, 1, p.keys, 0}, chunk.u, 1);
  for (int i = 0; i < chunk.n; i++)
    for (int64_t c = 0; c < width; c += W) {
      const vf x = load(chunk.q + i * width + c);
      own[i] += x * load(chunk.u + c) * load(chunk.k + i * width + c);
      store(chunk.asked + i * width + c, p.start(b, begin + i) ? vf{} : x);
    }
  sum_each(own, C, diagonal);
  for (int i = 0; i < chunk.n; i++) chunk.scores[i * C + i] = diagonal[i];
  return chunk.asked;
}

// One decay per key. With a bonus, token i reads what token i - 1 left: as reader i - 1 would, if it had query i.
template <class T>
void prepare_per_key(const Problem<T> &p, int64_t b, int64_t h, int64_t begin, Chunk &chunk) {
  const int64_t width = p.width();
  const int n = chunk.n, shift = p.bonus ? 1 : 0;
  float *d = chunk.d, *reads = chunk.own_reads, *writes = chunk.own_writes;
  read(p.gate_rows(p.g, b, begin, n, h), d, C,
       [&](vf x, int64_t i, int64_t) { return p.start(b, begin + i) ? vf{} : ev::exp(x); });
  std::fill_n((float *)chunk.scores, C * C, 0.0f);
  const float *q = shift ? own_scores(p, b, h, begin, chunk) : chunk.q;
  scores_per_key(q + shift * width, chunk.k, d, n - shift, width, chunk.scores + shift * C);
  for (int64_t c = 0; c < width; c += W) {
    vf reach = splat(1), rest = splat(1);
    for (int i = 0; i < n; i++) {
      const vf after = reach * load(d + i * width + c);
      store(reads + i * width + c, load(q + i * width + c) * (shift ? reach : after));
      reach = after;
    }
    for (int i = n - 1; i >= 0; i--) {
      store(writes + i * width + c, load(chunk.k + i * width + c) * rest);
      rest *= load(d + i * width + c);
    }
    store(chunk.keep + c, reach);
  }
  std::fill_n(chunk.reach, C, 1.0f);
  std::fill_n(chunk.rest, C, 1.0f);
  chunk.reads = reads;
  chunk.writes = writes;
}

// Gradients of the parts of a chunk with one decay per key, and room for that of g.
struct Slopes {
  Buffer scores, reads, writes, keep, g;
  explicit Slopes(int64_t width)
      : scores(C * C), reads(C * width), writes(C * width), keep(width), g(C * width) {}
};

// Adds the gradients of q, k and the bonus; that of g is left in the slopes.
template <class T>
void adjoint_per_key(const Problem<T> &p, int64_t b, int64_t begin, const Chunk &chunk, Slopes &s, float *gq, float *gk,
                     float *gu) {
  const int64_t width = p.width();
  const int n = chunk.n, shift = p.bonus ? 1 : 0;
  const float *d = chunk.d, *q = shift ? chunk.asked : chunk.q;
  float *reads = s.reads, *writes = s.writes, *g = s.g;
  std::fill_n(g, C * width, 0.0f);
  for (int i = 0; shift && i < n; i++)
    if (p.start(b, begin + i)) {  // it reads nothing but itself
      std::fill_n(reads + i * width, width, 0.0f);
      std::fill_n(s.scores + i * C, i, 0.0f);
    }
  for (int64_t c = 0; c < width; c += W) {  // from reads to what is read with, from writes to what is written
    vf reach = splat(1), rest = splat(1), since{}, until = load(s.keep + c) * load(chunk.keep + c);
    for (int i = 0; i < n; i++) {
      const int64_t at = i * width + c;
      const vf after = reach * load(d + at);
      store(g + at, until);
      until += load(writes + at) * load(chunk.writes + at);
      store(gq + at, load(gq + at) + load(reads + at) * (shift ? reach : after));
      reach = after;
    }
    for (int i = n - 1; i >= 0; i--) {
      const int64_t at = i * width + c;
      const vf read = load(reads + at) * load(chunk.reads + at);
      store(g + at, load(g + at) + since + (shift ? vf{} : read));
      since += read;
      store(gk + at, load(gk + at) + load(writes + at) * rest);
      rest *= load(d + at);
    }
  }
  adjoint_scores_per_key(q + shift * width, chunk.k, d, n - shift, width, s.scores + shift * C, gq + shift * width, gk,
                         g);
  for (int i = 0; shift && i < n; i++)
    for (int64_t c = 0; c < width; c += W) {
      const int64_t at = i * width + c;
      const vf own = load(chunk.u + c) * s.scores[i * C + i], pair = load(chunk.q + at) * load(chunk.k + at);
      store(gq + at, load(gq + at) + own * load(chunk.k + at));
      store(gk + at, load(gk + at) + own * load(chunk.q + at));
      store(gu + c, load(gu + c) + pair * s.scores[i * C + i]);
    }
}

}  // namespace ev

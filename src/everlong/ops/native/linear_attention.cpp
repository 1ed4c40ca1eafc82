// Linear attention with decay:  S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,   y_t = S_t^T q_t  (see the op for all forms).
//
// Heads, and blocks of their value lanes, go through chunks of 16 tokens. With P the decay from the start of the chunk
// to token i and Q the one from token j to its end, a chunk is a few products of matrices that lie in the first caches:
//     y = scores v + (P q) S,      S <- diag(keep) S + (Q k)^T v,
// scores being q_i k_j times the decays between j and i, multiplied up one by one. The heads of a task take turns every
// few chunks, so that rows of the inputs come whole and what heads share is made once. The backward pass starts from
// states kept between those turns, makes those between again, and holds the state, and a copy of its gradient, with keys
// in the lanes, where sums over values are plain products.
#include "head_steps.h"
#include "linear_attention.h"

using namespace ev;

namespace {

constexpr int64_t TURN = 32;   // tokens of a turn where no states are kept
constexpr int64_t PANEL = 64;  // keys whose part of a state passes through the first cache together

// q and k of one group during a turn, the chunks made of them for one head; each is made when another is asked for.
template <class T>
struct Turn {
  const Problem<T> &p;
  int64_t begin = -1, group = -1, head = -1;
  Buffer q, k, raw, turned;
  std::vector<Chunk> chunks;

  explicit Turn(const Problem<T> &p)
      : p(p), q(p.span * p.width()), k(p.span * p.width()), raw(p.span * C), turned(C * p.width()),
        chunks(p.span / C, Chunk(p.width(), p.per_key)) {}

  void forget() { begin = group = head = -1; }

  void load(int64_t b, int64_t h, int64_t at) {
    if (at != begin || p.group_of(h) != group) read_group(b, p.group_of(h), at);
    if (at == begin && h == head) return;
    begin = at;
    head = h;
    for (int64_t t = begin; t < p.end(begin); t += C) {
      Chunk &chunk = chunks[(t - begin) / C];
      chunk.n = p.size(t);
      chunk.q = chunk.reads = q + (t - begin) * p.width();
      chunk.k = chunk.writes = k + (t - begin) * p.width();
      if (p.per_key)
        prepare_per_key(p, b, h, t, chunk);
      else
        prepare_per_head(p, b, h, t, raw + (t - begin) * C, chunk);
    }
  }

  void read_group(int64_t b, int64_t wanted, int64_t at) {
    const int64_t width = p.width(), n = p.end(at) - at;
    group = wanted;
    head = -1;
    read(p.key_rows(p.q, b, at, n, group), q, p.span);
    read(p.key_rows(p.k, b, at, n, group), k, p.span);
    for (int64_t t = 0; !p.per_key && t < n; t += C) {
      transpose(k + t * width, C, width, turned);
      product(C, C, {q + t * width, width, 1}, width, turned, raw + t * C, C);
    }
  }
};

// rows of x times factors
inline void scale(const float *x, const float *factors, int64_t n, int64_t columns, float *out) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = i * columns; c < (i + 1) * columns; c += W) store(out + c, load(x + c) * factors[i]);
}

// S <- diag(keep) S + a b, with keep along the rows of S
inline void advance(const float *keep, Scalars a, int64_t depth, const float *b, int64_t rows, int64_t columns,
                    float *S) {
  tiles(rows, columns, [&](auto kind, int64_t i, int64_t c) {
    auto t = kind.zeros();
    t.load(S + i * columns + c, columns);
    for (int r = 0; r < t.rows; r++)
      for (auto &x : t.x[r]) x *= keep[i + r];
    t.add({a.p + i * a.row, a.row, a.col}, depth, b + c, columns);
    t.store(S + i * columns + c, columns);
  });
}

// next = S diag(keep) + a b: the same with keep along the columns; b has rows of `ld`
inline void advance_turned(const float *keep, Scalars a, int64_t depth, const float *b, int64_t ld, int64_t rows,
                           int64_t columns, const float *S, float *next) {
  tiles(rows, columns, [&](auto kind, int64_t i, int64_t c) {
    auto t = kind.zeros();
    t.load(S + i * columns + c, columns);
    for (int n = 0; n < t.vectors; n++)
      for (auto &row : t.x) row[n] *= load(keep + c + n * W);
    t.add({a.p + i * a.row, a.row, a.col}, depth, b + c, ld);
    t.store(next + i * columns + c, columns);
  });
}

// sums (+)= a b, from zero where `first`
inline void accumulate(int64_t n, int64_t columns, Scalars a, int64_t depth, const float *b, bool first, float *sums) {
  tiles(n, columns, [&](auto kind, int64_t i, int64_t c) {
    auto t = kind.zeros();
    if (!first) t.load(sums + i * columns + c, columns);
    t.add({a.p + i * a.row, a.row, a.col}, depth, b + c, columns);
    t.store(sums + i * columns + c, columns);
  });
}

// sums <- diag(factors) sums + a b, where row i takes columns 0 to i of a, or i to n where `upper`
inline void add_triangle(int64_t n, int64_t columns, const float *factors, Scalars a, bool upper, const float *b,
                         float *sums) {
  tiles(n, columns, [&](auto kind, int64_t i, int64_t c) {
    auto t = kind.zeros();
    t.load(sums + i * columns + c, columns);
    for (int r = 0; r < t.rows; r++)
      for (auto &x : t.x[r]) x *= factors[i + r];
    const int64_t from = upper ? i : 0, to = upper ? n : std::min<int64_t>(n, i + t.rows);
    t.add({a.p + i * a.row + from * a.col, a.row, a.col}, to - from, b + from * columns + c, columns);
    t.store(sums + i * columns + c, columns);
  });
}

// sums += a b, and what a b has in common with x, row by row, as vectors to be summed; sums and x have rows of `ld`
inline void add_product(int64_t n, int64_t columns, const float *a, int64_t depth, const float *b, const float *x,
                        float *sums, int64_t ld, vf *common) {
  tiles(n, columns, [&](auto kind, int64_t i, int64_t c) {
    auto t = kind.zeros();
    t.add({a + i * depth, depth, 1}, depth, b + c, columns);
    for (int r = 0; r < t.rows; r++) {
      vf total = common[i + r];
      for (int m = 0; m < t.vectors; m++) {
        const int64_t at = (i + r) * ld + c + m * W;
        total += t.x[r][m] * load(x + at);
        store(sums + at, load(sums + at) + t.x[r][m]);
      }
      common[i + r] = total;
    }
  });
}

// += raw k to the gradient of q, and raw^T q to that of k
inline void add_raw(const float *raw, int n, int64_t width, const float *q, const float *k, float *gq, float *gk) {
  tiles(n, width, [&](auto kind, int64_t i, int64_t c) {
    auto t = kind.zeros();
    t.load(gq + i * width + c, width);
    t.add({raw + i * C, C, 1}, std::min<int64_t>(n, i + t.rows), k + c, width);
    t.store(gq + i * width + c, width);
    t.load(gk + i * width + c, width);
    t.add({raw + i * C + i, 1, C}, n - i, q + i * width + c, width);
    t.store(gk + i * width + c, width);
  });
}

// out[c] = the sum over rows (an even number) of a b
inline void dot_rows(const float *a, const float *b, int64_t rows, int64_t columns, float *out) {
  const auto run = [&](auto kind, int64_t c) {
    auto even = kind.zeros(), odd = kind.zeros();
    for (int64_t i = c; i < rows * columns; i += 2 * columns)
      for (int m = 0; m < even.vectors; m++) {
        even.x[0][m] += load(a + i + m * W) * load(b + i + m * W);
        odd.x[0][m] += load(a + i + columns + m * W) * load(b + i + columns + m * W);
      }
    for (int m = 0; m < even.vectors; m++) store(out + c + m * W, even.x[0][m] + odd.x[0][m]);
  };
  int64_t c = 0;
  for (; c + 4 * W <= columns; c += 4 * W) run(Kind<1, 4>{}, c);
  for (; c < columns; c += W) run(Kind<1, 1>{}, c);
}

template <class T>
struct Forward : Problem<T> {
  const float *state;
  T *y;
  float *final_state, *kept;
  int64_t every, parts;  // a state is kept before each `every`-th token, if any

  struct Work {
    std::vector<Item> items;
    Turn<T> turn;
    Buffer v, scaled, out;
    Work(const Problem<T> &p, int64_t parts)
        : items(room_for_items(p, p.heads * p.value_blocks(), parts)), turn(p), v(C * p.lanes), scaled(C * p.lanes),
          out(C * p.lanes) {}
  };

  void task(int64_t b, int64_t from, int64_t to, Work &w) const {
    const auto &p = *this;
    const FlushTiny quick;
    const int64_t width = p.width(), slots = every ? blocks(p.time, every) : 0;
    auto &[items, turn, v, scaled, out] = w;
    set_items(p, state, b, from, to, items);
    turn.forget();
    for (int64_t begin = 0; begin < p.time; begin += p.span)
      for (auto &item : items) {
        const int64_t h = item.h, lane = item.lane, columns = item.columns;
        float *S = item.S;
        turn.load(b, h, begin);
        if (every && begin % every == 0) write(S, p.state_rows(kept, (b * slots + begin / every) * p.heads + h, lane));
        for (int64_t t = begin; t < p.end(begin); t += C) {
          const Chunk &chunk = turn.chunks[(t - begin) / C];
          read(p.value_rows(p.v, b, t, chunk.n, h, lane), v, C);
          scale(v, chunk.rest, chunk.n, columns, scaled);
          for (int64_t c = 0; c < width; c += PANEL) {
            const int64_t wide = std::min(PANEL, width - c);
            float *panel = S + c * columns;
            accumulate(chunk.n, columns, {chunk.reads + c, width, 1}, wide, panel, c == 0, out);
            advance(chunk.keep + c, {chunk.writes + c, 1, width}, chunk.n, scaled, wide, columns, panel);
          }
          add_triangle(chunk.n, columns, chunk.reach, {chunk.scores, C, 1}, false, v, out);
          write(out, p.value_rows(y, b, t, chunk.n, h, lane));
        }
      }
    for (const auto &item : items) write(item.S, p.state_rows(final_state, b * p.heads + item.h, item.lane));
  }

  void run(int threads) const {
    const int64_t count = this->heads * this->value_blocks();
    Attempts memory;
#pragma omp parallel num_threads(threads)
    {
      std::optional<Work> work;
      memory.attempt([&] { work.emplace(*this, parts); });
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t b = 0; b < this->batch; b++)
        for (int64_t part = 0; part < parts; part++)
            memory.attempt([&] { task(b, count * part / parts, count * (part + 1) / parts, *work); });
    }
    memory.check();
  }
};

// A task is a part of the heads and blocks that share q and k, whose gradients it sums.
template <class T>
struct Backward : Problem<T> {
  const float *kept, *gfinal;
  const T *gy;
  T *gv;
  // [parts B T G K] twice, [blocks B T H] or [blocks B T H K], [blocks B H K], [B H K V]
  float *gq, *gk, *gg, *gbonus, *gstate;
  int64_t parts;

  struct Work {
    std::vector<Item> items;
    Turn<T> turn;
    std::vector<Buffer> states, values;  // of each chunk, the states with keys in the lanes
    Buffer state, turned_L, turned_v, gy, gv, scaled_v, scaled_gy;
    Buffer gq, gk, raw;  // of all tokens of a turn; raw the gradients of the products q_i k_j
    Slopes slopes;
    Work(const Problem<T> &p, int64_t parts)
        : items(room_for_items(p, p.heads / p.groups * p.value_blocks(), parts)), turn(p), states(p.span / C, Buffer(p.lanes * p.width())), values(p.span / C, Buffer(C * p.lanes)),
          state(p.width() * p.lanes), turned_L(p.lanes * PANEL), turned_v(p.lanes * C), gy(C * p.lanes),
          gv(C * p.lanes), scaled_v(C * p.lanes), scaled_gy(C * p.lanes), gq(p.span * p.width()), gk(p.span * p.width()),
          raw(p.span * C), slopes(p.width()) {}
  };

  // Keys c to c + wide of a chunk: the gradients of what was read and written with them, given that of the state that
  // the chunk leaves, in L, which becomes that of the state it enters with.
  void panel(const Chunk &chunk, int64_t c, int64_t wide, int64_t columns, const float *S, const float *v, float *L,
             float *sum_q, float *sum_k, vf *read, vf *written, Work &w) const {
    const int64_t width = this->width();
    const int n = chunk.n;
    Slopes &s = w.slopes;
    transpose(L, wide, columns, w.turned_L);
    accumulate(n, columns, {chunk.writes + c, width, 1}, wide, L, c == 0, w.gv);
    dot_rows(S, w.turned_L, columns, wide, s.keep + c);
    if (this->per_key) {
      product(n, wide, {v, columns, 1}, columns, w.turned_L, s.writes + c, width);
      product(n, wide, {w.gy, columns, 1}, columns, S, s.reads + c, width);
      advance(chunk.keep + c, {chunk.reads + c, 1, width}, n, w.gy, wide, columns, L);
    } else {
      add_product(n, wide, w.scaled_v, columns, w.turned_L, chunk.k + c, sum_k + c, width, written);
      add_product(n, wide, w.scaled_gy, columns, S, chunk.q + c, sum_q + c, width, read);
      advance(chunk.keep + c, {chunk.reads + c, 1, width}, n, w.scaled_gy, wide, columns, L);
    }
  }

  // The gradients of chunk number i of a turn, whose state's gradient is in item.S.
  void chunk(int64_t b, int64_t begin, int i, Item &item, Work &w) const {
    const auto &p = *this;
    const Chunk &chunk = w.turn.chunks[i];
    const int64_t width = p.width(), columns = item.columns, row = item.lane / p.lanes * p.batch + b;
    const int n = chunk.n;
    const float *v = w.values[i];
    float *sum_q = w.gq + i * C * width, *sum_k = w.gk + i * C * width;
    Slopes &s = w.slopes;
    vf reads[C] = {}, writes[C] = {};
    read(p.value_rows(gy, b, begin, n, item.h, item.lane), w.gy, C);
    transpose(v, C, columns, w.turned_v);
    product(n, C, {w.gy, columns, 1}, columns, w.turned_v, s.scores, C);
    scale(v, chunk.rest, n, columns, w.scaled_v);
    scale(w.gy, chunk.reach, n, columns, w.scaled_gy);
    for (int64_t c = 0; c < width; c += PANEL)
      panel(chunk, c, std::min(PANEL, width - c), columns, w.states[i] + c * columns, v, item.S + c * columns, sum_q,
            sum_k, reads, writes, w);
    add_triangle(n, columns, chunk.rest, {chunk.scores, 1, C}, true, w.gy, w.gv);
    write(w.gv, p.value_rows(gv, b, begin, n, item.h, item.lane));
    if (p.per_key) {
      adjoint_per_key(p, b, begin, chunk, s, sum_q, sum_k, item.u);
      write(s.g, p.gate_rows(gg, row, begin, n, item.h));
    } else {
      adjoint_per_head(chunk, width, s.scores, s.keep, reads, writes, w.raw + i * C * C, s.g);
      for (int t = 0; t < n; t++) gg[(row * p.time + begin + t) * p.heads + item.h] = s.g[t];
    }
  }

  // The states within a turn, made again, and the gradients of its chunks.
  void stretch(int64_t b, int64_t begin, Item &item, Work &w) const {
    const auto &p = *this;
    const int64_t columns = item.columns, width = p.width(), slots = blocks(p.time, p.span);
    const int many = int(blocks(p.end(begin) - begin, C));
    w.turn.load(b, item.h, begin);
    read(p.state_rows(kept, (b * slots + begin / p.span) * p.heads + item.h, item.lane, true), w.state, width);
    for (int i = 0; i < many; i++) {
      const Chunk &chunk = w.turn.chunks[i];
      read(p.value_rows(p.v, b, begin + i * C, chunk.n, item.h, item.lane), w.values[i], C);
      scale(w.values[i], chunk.rest, chunk.n, columns, w.scaled_v);
      for (int64_t c = 0; c < width; c += PANEL) {
        const int64_t wide = std::min(PANEL, width - c), at = c * columns;
        if (i == 0) transpose(w.state + at, wide, columns, w.states[0] + at);
        if (i + 1 < many)
          advance_turned(chunk.keep + c, {w.scaled_v, 1, columns}, chunk.n, chunk.writes + c, width, columns, wide,
                         w.states[i] + at, w.states[i + 1] + at);
      }
    }
    for (int i = many - 1; i >= 0; i--) chunk(b, begin + i * C, i, item, w);
  }

  void task(int64_t b, int64_t group, int64_t part, Work &w) const {
    const auto &p = *this;
    const FlushTiny quick;
    const int64_t width = p.width(), count = p.heads / p.groups * p.value_blocks(), row = part * p.batch + b;
    auto &items = w.items;
    set_items(p, gfinal, b, group * count + count * part / parts, group * count + count * (part + 1) / parts, items);
    w.turn.forget();
    for (int64_t begin = (blocks(p.time, p.span) - 1) * p.span; begin >= 0; begin -= p.span) {
      const int64_t n = p.end(begin) - begin;
      for (Buffer *sums : {&w.gq, &w.gk}) std::fill_n((float *)*sums, p.span * width, 0.0f);
      std::fill_n((float *)w.raw, p.span * C, 0.0f);
      for (auto &item : items) stretch(b, begin, item, w);
      for (int64_t t = 0; !p.per_key && t < n; t += C)
        add_raw(w.raw + t * C, p.size(begin + t), width, w.turn.q + t * width, w.turn.k + t * width, w.gq + t * width,
                w.gk + t * width);
      write(w.gq, p.key_rows(gq, row, begin, n, group));
      write(w.gk, p.key_rows(gk, row, begin, n, group));
    }
    for (const auto &item : items) {
      write(item.S, p.state_rows(gstate, b * p.heads + item.h, item.lane));
      float *to = gbonus + ((item.lane / p.lanes * p.batch + b) * p.heads + item.h) * p.keys;
      if (p.bonus) write(item.u, Rows<float>{to, 0, 1, p.keys, 0});
    }
  }

  void run(int threads) const {
    Attempts memory;
#pragma omp parallel num_threads(threads)
    {
      std::optional<Work> work;
      memory.attempt([&] { work.emplace(*this, parts); });
#pragma omp for collapse(3) schedule(dynamic)
      for (int64_t b = 0; b < this->batch; b++)
        for (int64_t group = 0; group < this->groups; group++)
          for (int64_t part = 0; part < parts; part++)
            memory.attempt([&] { task(b, group, part, *work); });
    }
    memory.check();
  }
};

}  // namespace

// ---- one token in a program ----

namespace {

// Linear attention: S = diag(e) S + k v^T, y = S^T q, or with a bonus y = (S_old + diag(u) k v^T)^T q. One head.
struct Attend {
  int64_t heads, groups, keys, values, gates;
  Ref q, k, v, g, bonus, y;
  float *state;
};
template <int N>
void attend_columns(const Attend &p, int64_t b, int64_t head, int64_t c, const float *decay) {
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
void attend_step(const Attend &p, int64_t b, int64_t head, float *decay) {
  decays(p.gates, p.g, b, head, p.keys, decay);
  every_columns(p.values, [&](int64_t c, auto n) { attend_columns<decltype(n)::value>(p, b, head, c, decay); });
}

void attend(const Instruction &i, Share share, const int64_t *) {
  const Attend step{i.size[1], i.number[1], i.size[2], i.size[3], i.number[0], i.in[0], i.in[1], i.in[2], i.in[3], i.in[4],
                    i.out, i.in[5].at};
  every_head(i.size[0], i.size[1], i.size[2], share, [&](int64_t b, int64_t h, float *decay) { attend_step(step, b, h, decay); });
}
const Register attend_kind("attend", attend);

}  // namespace

extern "C" {

// Kept are the states before every `every`-th token, a multiple of 16; 0 for none. Heads and blocks of 64 value lanes
// are shared out to `parts` tasks a row, or a group of a row in the backward pass.
int64_t ev_linear_attention(int64_t half, int64_t batch, int64_t time, int64_t groups, int64_t heads, int64_t keys,
                         int64_t values, int64_t per_key, const void *q, const void *k, const void *v, const float *g,
                         const float *bonus, const float *state, const uint8_t *starts, void *y, float *final_state,
                         float *kept, int64_t every, int64_t parts, int64_t threads) {
  return status([&] {
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const Problem<T> p{{batch, time, groups, heads, keys, values, every ? every : TURN, false, starts},
                         (const T *)q, (const T *)k, (const T *)v, g, bonus, bool(per_key)};
      Forward<T>{p, state, (T *)y, final_state, kept, every, parts}.run(int(threads));
    };
    half ? run(bf16{}) : run(0.0f);
  });
}

int64_t ev_linear_attention_backward(int64_t half, int64_t batch, int64_t time, int64_t groups, int64_t heads,
                                  int64_t keys, int64_t values, int64_t per_key, const void *q, const void *k,
                                  const void *v, const float *g, const float *bonus, const uint8_t *starts,
                                  const float *kept, int64_t every, const void *gy, const float *gfinal, void *gv,
                                  float *gq, float *gk, float *gg, float *gbonus, float *gstate, int64_t parts,
                                  int64_t threads) {
  return status([&] {
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const Problem<T> p{{batch, time, groups, heads, keys, values, every, true, starts},
                         (const T *)q, (const T *)k, (const T *)v, g, bonus, bool(per_key)};
      Backward<T>{p, kept, gfinal, (const T *)gy, (T *)gv, gq, gk, gg, gbonus, gstate, parts}.run(int(threads));
    };
    half ? run(bf16{}) : run(0.0f);
  });
}

}  // extern "C"

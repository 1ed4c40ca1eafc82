// The generalised delta rule:  u_t = S_{t-1}^T a_t,   S_t = diag(exp g_t) S_{t-1} + b_t u_t^T + k_t v_t^T,   y_t = S_t^T q_t,
// or S_t = diag(exp g_t) S_{t-1} + k_t (v_t + u_t)^T without b (see the op for what that serves).
//
// Forwards, values lie across the lanes and a token is one pass over the state: it updates a row, reads it with q, and
// with the next token's a. Backwards, keys lie across the lanes: the states of a chunk are made again from a kept one
// and the u that the forward pass left, then each token is one pass over them and over the gradient L of the state,
//     gu = L b,  gv = L k,  gk = L v,  gb = L u,  gq = S_t gy,  ga = S_{t-1} gu,  gg = exp g (L . S_{t-1}),
//     L <- diag(exp g) L + a gu^T + q_{t-1} gy_{t-1}^T,
// which also sums what the token before needs first.
#include "head_steps.h"
#include "heads.h"

using namespace ev;

namespace {

template <class T>
struct Problem : Heads {
  const T *q, *k, *v, *a, *b;  // b null where it is k
  const float *g;              // [B T H], [B T H K] or null
  bool per_key;

  bool decays() const { return g || starts; }
};

// Some tokens of a head: inputs with a key axis in fp32, rows of width, and w = exp g. A row of zeros lies before each.
struct Chunk {
  int n;
  int64_t width;
  Buffer lines;
  float *q, *k, *a, *b, *w;

  Chunk(int64_t width, int64_t tokens) : width(width), lines(5 * (tokens + 1) * width) {
    float **rows[] = {&q, &k, &a, &b, &w};
    for (int i = 0; i < 5; i++) *rows[i] = lines + (i * (tokens + 1) + 1) * width;
  }
  Chunk(const Chunk &) = delete;
};

template <class T>
void load_chunk(const Problem<T> &p, int64_t row, int64_t h, int64_t begin, int64_t n, Chunk &chunk) {
  const auto unless_start = [&](vf x, int64_t i) { return p.start(row, begin + i) ? vf{} : x; };
  chunk.n = int(n);
  read(p.key_rows(p.q, row, begin, n, h), chunk.q, n);
  read(p.key_rows(p.k, row, begin, n, h), chunk.k, n);
  read(p.key_rows(p.a, row, begin, n, h), chunk.a, n,  // a document that starts reads nothing
       [&](vf x, int64_t i, int64_t) { return unless_start(x, i); });
  if (p.b) read(p.key_rows(p.b, row, begin, n, h), chunk.b, n);
  if (p.g && p.per_key)
    read(p.gate_rows(p.g, row, begin, n, h), chunk.w, n,
         [&](vf x, int64_t i, int64_t) { return unless_start(ev::exp(x), i); });
  else if (p.decays())
    for (int64_t i = 0; i < n; i++) {
      const vf g = splat(p.g ? p.g[(row * p.time + begin + i) * p.heads + h] : 0.0f);
      std::fill_n(chunk.w + i * chunk.width, chunk.width, unless_start(ev::exp(g), i)[0]);
    }
}

// N vectors of value lanes through a chunk. S [keys N*W]; v, y, u are rows of `ld`.
template <int N, bool DECAYS, bool OWN_B>
void forward_lanes(const Chunk &chunk, int64_t keys, const float *v, float *S, float *y, float *u, int64_t ld) {
  const int64_t width = chunk.width;
  vf read[N] = {};
  for (int64_t r = 0; r < keys; r++)
    for (int m = 0; m < N; m++) read[m] += load(S + (r * N + m) * W) * chunk.a[r];
  for (int t = 0; t < chunk.n; t++) {
    const float *q = chunk.q + t * width, *k = chunk.k + t * width, *b = chunk.b + t * width, *w = chunk.w + t * width;
    const float *next = t + 1 < chunk.n ? chunk.a + (t + 1) * width : q;  // the last one is for nobody
    vf value[N], push[N], out[N] = {}, ahead[N] = {};
    for (int m = 0; m < N; m++) {
      value[m] = load(v + t * ld + m * W);
      push[m] = OWN_B ? read[m] : value[m] + read[m];
      store(u + t * ld + m * W, read[m]);
    }
    for (int64_t r = 0; r < keys; r++) {
      const float decay = DECAYS ? w[r] : 1, first = OWN_B ? b[r] : k[r], second = k[r], now = q[r], then = next[r];
      for (int m = 0; m < N; m++) {
        vf x = load(S + (r * N + m) * W);
        if (DECAYS) x *= decay;
        x += push[m] * first;
        if (OWN_B) x += value[m] * second;
        store(S + (r * N + m) * W, x);
        out[m] += x * now;
        ahead[m] += x * then;
      }
    }
    for (int m = 0; m < N; m++) {
      store(y + t * ld + m * W, out[m]);
      read[m] = ahead[m];
    }
  }
}

template <class T>
struct Forward : Problem<T> {
  const float *state;
  T *y;
  float *final_state, *kept, *u;  // u [B T H V], and states before each `every`-th token, where these are wanted
  int64_t every, parts;

  struct Work {
    std::vector<Item> items;
    Chunk chunk;
    Buffer v, out, u, S;
    Work(const Heads &p, int64_t parts)
        : items(room_for_items(p, p.heads * p.value_blocks(), parts)), chunk(p.width(), p.span), v(p.span * p.lanes),
          out(p.span * p.lanes), u(p.span * p.lanes), S(p.width() * p.lanes) {}
  };

  template <int N>
  void lanes(const Chunk &chunk, int64_t lane, int64_t ld, float *S, Work &w) const {
    const auto run = this->b ? (this->decays() ? forward_lanes<N, true, true> : forward_lanes<N, false, true>)
                             : (this->decays() ? forward_lanes<N, true, false> : forward_lanes<N, false, false>);
    run(chunk, this->keys, w.v + lane, S, w.out + lane, w.u + lane, ld);
  }

  void turn(int64_t row, int64_t begin, Item &item, Work &w) const {
    const auto &p = *this;
    const int64_t columns = item.columns, n = w.chunk.n;
    read(p.value_rows(p.v, row, begin, n, item.h, item.lane), w.v, n);
    for (int64_t c = 0; c < columns;) {
      const int64_t many = vectors(columns - c);
      const auto run = many == 4 ? &Forward::lanes<4> : many == 2 ? &Forward::lanes<2> : &Forward::lanes<1>;
      (this->*run)(w.chunk, c, columns, item.S + c * p.width(), w);
      c += many * W;
    }
    write(w.out, p.value_rows(y, row, begin, n, item.h, item.lane));
    if (u) write(w.u, p.value_rows(u, row, begin, n, item.h, item.lane));
  }

  // How many vectors of a row go through a chunk together, where `left` columns are left.
  static int64_t vectors(int64_t left) { return left >= 4 * W && W == 16 ? 4 : left >= 2 * W ? 2 : 1; }

  // Between rows of all columns and blocks of as many as go through a chunk together.
  void repack(const float *from, int64_t columns, bool out, float *to) const {
    for (int64_t c = 0, many; c < columns; c += many) {
      many = vectors(columns - c) * W;
      for (int64_t r = 0; r < this->width(); r++) {
        const int64_t row = r * columns + c, block = c * this->width() + r * many;
        std::copy_n(from + (out ? block : row), many, to + (out ? row : block));
      }
    }
  }

  void task(int64_t row, int64_t from, int64_t to, Work &w) const {
    const auto &p = *this;
    const FlushTiny quick;
    const int64_t slots = every ? blocks(p.time, every) : 0;
    set_items(p, state, row, from, to, w.items);
    for (auto &item : w.items) {
      repack(item.S, item.columns, false, w.S);
      std::copy_n((float *)w.S, p.width() * item.columns, (float *)item.S);
    }
    for (int64_t begin = 0; begin < p.time; begin += p.span) {
      int64_t head = -1;
      for (auto &item : w.items) {
        if (item.h != head) load_chunk(p, row, item.h, begin, p.end(begin) - begin, w.chunk);
        head = item.h;
        if (every && begin % every == 0) {
          repack(item.S, item.columns, true, w.S);
          write(w.S, p.state_rows(kept, (row * slots + begin / every) * p.heads + item.h, item.lane));
        }
        turn(row, begin, item, w);
      }
    }
    for (auto &item : w.items) {
      repack(item.S, item.columns, true, w.S);
      write(w.S, p.state_rows(final_state, row * p.heads + item.h, item.lane));
    }
  }

  void run(int threads) const {
    const int64_t count = this->heads * this->value_blocks();
    Attempts memory;
#pragma omp parallel num_threads(threads)
    {
      std::optional<Work> work;
      memory.attempt([&] { work.emplace(*this, parts); });
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t row = 0; row < this->batch; row++)
        for (int64_t part = 0; part < parts; part++)
            memory.attempt([&] { task(row, count * part / parts, count * (part + 1) / parts, *work); });
    }
    memory.check();
  }
};

// What goes with a token and a row of the turned state, rows of columns: v (v + u without b), u, and the gradient of y
// after a row of zeros.
struct Pushes {
  const float *v, *u, *gy;
};

// Gradients of a chunk's inputs with a key axis, rows of width as in Chunk.
struct Slopes {
  Buffer lines;
  float *q, *k, *a, *b, *g;
  Slopes(int64_t width, int64_t tokens) : lines(5 * (tokens + 1) * width) {
    float **rows[] = {&q, &k, &a, &b, &g};
    for (int i = 0; i < 5; i++) *rows[i] = lines + (i * (tokens + 1) + 1) * width;
  }
  Slopes(const Slopes &) = delete;
};

// A turned state has keys in the lanes: panels of PANEL keys (or W, the last of them), each [rows keys].
constexpr int64_t PANEL = W == 16 ? 32 : W;
inline int64_t panel(int64_t left) { return left >= PANEL ? PANEL : W; }

// states[t] -> states[t + 1] for the tokens of a chunk, each turned.
template <bool DECAYS, bool OWN_B>
void make_states(const Chunk &chunk, int64_t rows, const Pushes &in, float *states) {
  constexpr int R = 8;  // rows is a multiple of it
  const int64_t width = chunk.width;
  for (int64_t c = 0; c < width; c += W) {
    const int64_t first = c / PANEL * PANEL, wide = panel(width - first);
    for (int64_t r = 0; r < rows; r += R) {
      float *place = states + first * rows + r * wide + c - first;
      vf x[R];
      for (int i = 0; i < R; i++) x[i] = load(place + i * wide);
      for (int t = 0; t < chunk.n; t++) {
        const float *v = in.v + t * rows + r, *u = in.u + t * rows + r;
        const int64_t now = t * width + c;
        const vf k = load(chunk.k + now), b = OWN_B ? load(chunk.b + now) : k, w = DECAYS ? load(chunk.w + now) : k;
        place += rows * width;
        for (int i = 0; i < R; i++) {
          if (DECAYS) x[i] *= w;
          if (OWN_B) x[i] += b * u[i];
          x[i] += k * v[i];
          store(place + i * wide, x[i]);
        }
      }
    }
  }
}

inline void turn_state(const float *state, int64_t width, int64_t columns, float *turned) {
  for (int64_t c = 0; c < width; c += panel(width - c))
    transpose(state + c * columns, panel(width - c), columns, turned + c * columns);
}
inline void turn_back(const float *turned, int64_t width, int64_t columns, float *state) {
  for (int64_t c = 0; c < width; c += panel(width - c))
    transpose(turned + c * columns, columns, panel(width - c), state + c * columns);
}

// Token t back, for N vectors of keys. On entry L is the gradient of the state that the token leaves, y's part included;
// on return that of the state `before` it, with the part of the token before, whose k and b times it are left in sums,
// a vector per row each. gu is what went through u. With ENTER, t is no token yet.
template <int N, bool DECAYS, bool OWN_B, bool ENTER>
EV_INLINE void back_one(const Chunk &chunk, int t, int64_t c, int64_t rows, const Pushes &in, const float *gu,
                        const float *before, float *L, vf *sums, const Slopes &s) {
  const int64_t width = chunk.width, at = t * width + c, last = at - width;
  const float *v = in.v + t * rows, *u = in.u + t * rows, *gy = in.gy + t * rows;
  vf a[N] = {}, w[N] = {}, q[N], b[N] = {}, k[N], ga[N] = {}, gw[N] = {}, gq[N] = {}, gk[N] = {}, gb[N] = {};
  for (int m = 0; m < N; m++) {
    if (!ENTER) a[m] = load(chunk.a + at + m * W);
    if (!ENTER && DECAYS) w[m] = load(chunk.w + at + m * W);
    q[m] = load(chunk.q + last + m * W);
    k[m] = load(chunk.k + last + m * W);
    if (OWN_B) b[m] = load(chunk.b + last + m * W);
  }
  for (int64_t r = 0; r < rows; r++) {
    const vf of_y = splat(gy[r]), of_u = ENTER ? vf{} : splat(gu[r]), of_k = ENTER ? vf{} : splat(v[r]);
    const vf of_b = ENTER || !OWN_B ? vf{} : splat(u[r]);
    vf to_k = c ? sums[r] : vf{}, to_b = OWN_B && c ? sums[rows + r] : vf{};
    for (int m = 0; m < N; m++) {
      const int64_t place = c * rows + (r * N + m) * W;
      const vf S = load(before + place);
      vf x = load(L + place);
      gq[m] += S * of_y;
      if (!ENTER) {
        ga[m] += S * of_u;
        gk[m] += x * of_k;
        if (OWN_B) gb[m] += x * of_b;
        if (DECAYS) gw[m] += x * S;
        if (DECAYS) x *= w[m];
        x += a[m] * of_u;
      }
      x += q[m] * of_y;
      store(L + place, x);
      to_k += x * k[m];
      if (OWN_B) to_b += x * b[m];
    }
    sums[r] = to_k;
    if (OWN_B) sums[rows + r] = to_b;
  }
  for (int m = 0; m < N; m++) {
    const int64_t now = at + m * W, then = last + m * W;
    store(s.q + then, load(s.q + then) + gq[m]);
    if (ENTER) continue;
    store(s.a + now, load(s.a + now) + ga[m]);
    store(s.k + now, load(s.k + now) + gk[m]);
    if (OWN_B) store(s.b + now, load(s.b + now) + gb[m]);
    if (DECAYS) store(s.g + now, load(s.g + now) + gw[m] * w[m]);
  }
}

// A chunk back: gv, and the gradients of its other inputs, given those of y and of the state it leaves.
template <bool DECAYS, bool OWN_B>
void back_chunk(const Chunk &chunk, int64_t rows, const Pushes &in, float *states, float *L, float *gv, vf *sums,
                const Slopes &s) {
  constexpr int N = int(PANEL / W);
  const int64_t width = chunk.width;
  alignas(64) float own[Heads::lanes];
  make_states<DECAYS, OWN_B>(chunk, rows, in, states);
  const auto all_keys = [&](auto enter, int t, const float *gu) {
    constexpr bool ENTER = decltype(enter)::value;
    const float *before = states + t * rows * width;
    int64_t c = 0;
    for (; c + N * W <= width; c += N * W)
      back_one<N, DECAYS, OWN_B, ENTER>(chunk, t, c, rows, in, gu, before, L, sums, s);
    for (; c < width; c += W) back_one<1, DECAYS, OWN_B, ENTER>(chunk, t, c, rows, in, gu, before, L, sums, s);
  };
  all_keys(std::true_type{}, chunk.n, nullptr);
  for (int t = chunk.n - 1; t >= 0; t--) {
    float *gu = OWN_B ? own : gv + t * rows;
    sum_each(sums, int(rows), gv + t * rows);
    if (OWN_B) sum_each(sums + rows, int(rows), gu);
    all_keys(std::false_type{}, t, gu);
  }
}

template <class T>
struct Backward : Problem<T> {
  const float *kept, *u, *gfinal;
  const T *gy;
  T *gv;
  float *gq, *gk, *ga, *gb, *gg, *gstate;  // [parts B T H K], gg [parts B T H] where g is, [B H K V]
  int64_t parts;

  struct Work {
    std::vector<Item> items;
    Chunk chunk;
    Slopes slopes;
    Buffer states, turned, v, u, gy, gv;
    std::vector<vf> sums;
    Work(const Heads &p, int64_t parts)
        : items(room_for_items(p, p.value_blocks(), parts)), chunk(p.width(), p.span), slopes(p.width(), p.span),
          states((p.span + 1) * p.width() * p.lanes), turned(p.width() * p.lanes), v(p.span * p.lanes),
          u(p.span * p.lanes), gy((p.span + 1) * p.lanes), gv(p.span * p.lanes), sums(2 * p.lanes) {}
  };

  void turn(int64_t row, int64_t begin, Item &item, Work &w) const {
    const auto &p = *this;
    const int64_t rows = item.columns, n = w.chunk.n, h = item.h, lane = item.lane;
    const int64_t slot = (row * blocks(p.time, p.span) + begin / p.span) * p.heads + h;
    read(p.state_rows(kept, slot, lane, true), w.turned, p.width());
    turn_state(w.turned, p.width(), rows, w.states);
    read(p.value_rows(u, row, begin, n, h, lane), w.u, n);
    read(p.value_rows(p.v, row, begin, n, h, lane), w.v, n,
         [&](vf x, int64_t i, int64_t c) { return p.b ? x : x + load(w.u + i * rows + c); });
    read(p.value_rows(gy, row, begin, n, h, lane), w.gy + rows, n);
    const auto run = p.b ? (p.decays() ? back_chunk<true, true> : back_chunk<false, true>)
                         : (p.decays() ? back_chunk<true, false> : back_chunk<false, false>);
    run(w.chunk, rows, {w.v, w.u, w.gy}, w.states, item.S, w.gv, w.sums.data(), w.slopes);
    write(w.gv, p.value_rows(gv, row, begin, n, h, lane));
  }

  void write_slopes(int64_t row, int64_t begin, int64_t h, int64_t part, Work &w) const {
    const auto &p = *this;
    const int64_t n = w.chunk.n, at = part * p.batch + row, width = p.width();
    Slopes &s = w.slopes;
    for (int64_t i = 0; i < n; i++)
      if (p.start(row, begin + i)) std::fill_n(s.a + i * width, width, 0.0f);
    write(s.q, p.key_rows(gq, at, begin, n, h));
    write(s.k, p.key_rows(gk, at, begin, n, h));
    write(s.a, p.key_rows(ga, at, begin, n, h));
    if (p.b) write(s.b, p.key_rows(gb, at, begin, n, h));
    if (p.g && p.per_key) write(s.g, p.gate_rows(gg, at, begin, n, h));
    if (p.g && !p.per_key)
      for (int64_t i = 0; i < n; i++) {
        vf total{};
        for (int64_t c = 0; c < width; c += W) total += load(s.g + i * width + c);
        gg[(at * p.time + begin + i) * p.heads + h] = sum(total);
      }
  }

  void task(int64_t row, int64_t h, int64_t part, Work &w) const {
    const auto &p = *this;
    const FlushTiny quick;
    const int64_t count = p.value_blocks(), width = p.width();
    set_items(p, gfinal, row, h * count + count * part / parts, h * count + count * (part + 1) / parts, w.items);
    for (auto &item : w.items) {
      std::copy_n((float *)item.S, width * item.columns, (float *)w.turned);
      turn_state(w.turned, width, item.columns, item.S);
    }
    for (int64_t begin = (blocks(p.time, p.span) - 1) * p.span; begin >= 0; begin -= p.span) {
      load_chunk(p, row, h, begin, p.end(begin) - begin, w.chunk);
      std::fill_n((float *)w.slopes.lines, 5 * (p.span + 1) * width, 0.0f);
      for (auto &item : w.items) turn(row, begin, item, w);
      write_slopes(row, begin, h, part, w);
    }
    for (auto &item : w.items) {
      turn_back(item.S, width, item.columns, w.turned);
      write(w.turned, p.state_rows(gstate, row * p.heads + h, item.lane));
    }
  }

  void run(int threads) const {
    Attempts memory;
#pragma omp parallel num_threads(threads)
    {
      std::optional<Work> work;
      memory.attempt([&] { work.emplace(*this, parts); });
#pragma omp for collapse(3) schedule(dynamic)
      for (int64_t row = 0; row < this->batch; row++)
        for (int64_t h = 0; h < this->heads; h++)
          for (int64_t part = 0; part < parts; part++)
            memory.attempt([&] { task(row, h, part, *work); });
    }
    memory.check();
  }
};

}  // namespace

// ---- one token in a program ----

namespace {

// Delta rule: u = S^T a, S = diag(e) S + b u^T + k v^T (without b: k (v + u)^T), y = S^T q. One head.
struct Delta {
  int64_t heads, keys, values, gates;
  Ref q, k, v, a, b, g, y;
  float *state;
};
template <int N>
void delta_columns(const Delta &p, int64_t row, int64_t head, int64_t c, const float *decay) {
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
void delta_step(const Delta &p, int64_t row, int64_t head, float *decay) {
  decays(p.gates, p.g, row, head, p.keys, decay);
  every_columns(p.values, [&](int64_t c, auto n) { delta_columns<decltype(n)::value>(p, row, head, c, decay); });
}

void delta(const Instruction &i, Share share, const int64_t *) {
  const Delta step{i.size[1], i.size[2], i.size[3], i.number[0], i.in[0], i.in[1], i.in[2], i.in[3], i.in[4], i.in[5], i.out,
                   i.in[6].at};
  every_head(i.size[0], i.size[1], i.size[2], share, [&](int64_t b, int64_t h, float *decay) { delta_step(step, b, h, decay); });
}
const Register delta_kind("delta", delta);

}  // namespace

extern "C" {

// Kept are the states before every `every`-th token (0 for none), and u [B T H V]. Heads and blocks of 64 values are
// shared out to `parts` tasks a row, or a head of a row in the backward pass.
int64_t ev_delta_rule(int64_t half, int64_t batch, int64_t time, int64_t heads, int64_t keys, int64_t values,
                   int64_t per_key, const void *q, const void *k, const void *v, const void *a,
                   const void *b, const float *g, const float *state, const uint8_t *starts, void *y,
                   float *final_state, float *kept, float *u, int64_t every, int64_t parts, int64_t threads) {
  return status([&] {
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const Problem<T> p{{batch, time, heads, heads, keys, values, every ? every : 16, false, starts},
                         (const T *)q, (const T *)k, (const T *)v, (const T *)a, (const T *)b, g, bool(per_key)};
      Forward<T>{p, state, (T *)y, final_state, kept, u, every, parts}.run(int(threads));
    };
    half ? run(bf16{}) : run(0.0f);
  });
}

int64_t ev_delta_rule_backward(int64_t half, int64_t batch, int64_t time, int64_t heads, int64_t keys, int64_t values,
                            int64_t per_key, const void *q, const void *k, const void *v, const void *a,
                            const void *b, const float *g, const uint8_t *starts, const float *kept, const float *u,
                            int64_t every, const void *gy, const float *gfinal, void *gv, float *gq, float *gk,
                            float *ga, float *gb, float *gg, float *gstate, int64_t parts, int64_t threads) {
  return status([&] {
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const Problem<T> p{{batch, time, heads, heads, keys, values, every, true, starts},
                         (const T *)q, (const T *)k, (const T *)v, (const T *)a, (const T *)b, g, bool(per_key)};
      Backward<T>{p, kept, u, gfinal, (const T *)gy, (T *)gv, gq, gk, ga, gb, gg, gstate, parts}.run(int(threads));
    };
    half ? run(bf16{}) : run(0.0f);
  });
}

}  // extern "C"

// A recorded program of one token: instructions over buffers that stay where they are, replayed by one call.
//
// All threads walk the same list. A small instruction is done by thread 0 alone, a large one by all; the threads meet
// at a barrier before and after every shared instruction, so that a run of small ones costs no meeting at all.
#include <sched.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "attention.h"
#include "product.h"
#include "steps.h"

#if defined(_OPENMP)
extern "C" int omp_get_num_threads();
#else
inline int omp_get_num_threads() { return 1; }
#endif

using namespace ev;

namespace {

constexpr int INPUTS = 7, BLOCK = 256;  // BLOCK: numbers along the last axis done at a time

// The same layout as `Instruction` in program.py.
struct Instruction {
  int64_t code, shared;
  int64_t size[4];
  Ref out, in[INPUTS];
  int64_t number[4];
  double scalar[2];
  const void *raw[2];
};

enum Code : int64_t {
  COPY, NEG, ABS, EXP, EXPM1, LOG, LOG1P, SQRT, RSQRT, RECIPROCAL, SIGMOID, SILU, TANH, GELU, GELU_TANH, RELU, SOFTPLUS,
  LOG_SIGMOID, ELU, SIN, COS, NOT, POWER, CLAMP,                                                       // one input
  ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, LT, LE, GT, GE, EQ, NE, AND, OR,                                 // two
  WHERE, ADDCMUL,                                                                                      // three
  SUM = 64, MEAN, MAX, NORM, MATMUL, EMBED, PREPARE, PRODUCT, CONV, SCAN, ATTEND, DELTA,
  COUNT, NUMBER, TURN, ROTATE, SLOTS_, MERGE, HISTORY
};

struct Share {
  int64_t id, count;
  int64_t begin(int64_t n) const { return n * id / count; }
  int64_t end(int64_t n) const { return n * (id + 1) / count; }
};

// Sense-reversing barrier; gives the core away where the others take long. A thread that waits does `meanwhile`.
struct Barrier {
  std::atomic<int64_t> waiting{0}, round{0};
  template <class F>
  void meet(int64_t threads, F meanwhile) {
    if (threads == 1) return;
    const int64_t mine = round.load(std::memory_order_acquire);
    if (waiting.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      waiting.store(0, std::memory_order_relaxed);
      round.store(mine + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == mine; spins++) {
      if (meanwhile()) continue;
      if (spins > 4000) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
};

template <class F>
vf lanewise(vf x, F f) {
  for (int i = 0; i < W; i++) x[i] = f(x[i]);
  return x;
}
vf truth(vi mask) { return select(mask, splat(1.0f), vf{}); }
vf tanh(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }
vf accurate_tanh(vf x) {  // near 0 the difference above cancels: an odd polynomial there
  const vf x2 = x * x;
  const vf small = x * (1.0f + x2 * (-0.33333333f + x2 * (0.13333333f - x2 * 0.053968254f)));
  return select((x < 0.1f) & (x > -0.1f), small, tanh(x));
}

// The numbers of the instruction's space, cut into runs along the last axis; f(out, in pointers, length).
template <int N, class F>
void every_run(const Instruction &i, Share share, F f) {
  const int64_t runs = (i.size[3] + BLOCK - 1) / BLOCK, rows = i.size[0] * i.size[1] * i.size[2], all = rows * runs;
  for (int64_t task = share.begin(all); task < share.end(all); task++) {
    const int64_t row = task / runs, from = task % runs * BLOCK;
    const int64_t at[3] = {row / (i.size[1] * i.size[2]), row / i.size[2] % i.size[1], row % i.size[2]};
    const auto place = [&](const Ref &r) {
      return r.at + at[0] * r.stride[0] + at[1] * r.stride[1] + at[2] * r.stride[2] + from * r.stride[3];
    };
    const float *in[N];
    for (int n = 0; n < N; n++) in[n] = place(i.in[n]);
    f(place(i.out), in, i.size[3] - from < BLOCK ? i.size[3] - from : BLOCK);
  }
}

template <int N, class F>
void map(const Instruction &i, Share share, F f) {
  every_run<N>(i, share, [&](float *out, const float **in, int64_t length) {
    for (int64_t k = 0; k < length; k += W) {
      const int n = lanes(length - k);
      vf v[N];
      for (int j = 0; j < N; j++) v[j] = load(in[j] + k * i.in[j].stride[3], i.in[j].stride[3], n);
      store(out + k * i.out.stride[3], i.out.stride[3], f(v), n);
    }
  });
}

void map1(const Instruction &i, Share share) {
  const float s = float(i.scalar[0]), t = float(i.scalar[1]);
  const auto run = [&](auto f) { map<1>(i, share, [f](vf *v) { return f(v[0]); }); };
  switch (i.code) {
    case COPY: return run([](vf x) { return x; });
    case NEG: return run([](vf x) { return -x; });
    case ABS: return run([](vf x) { return select(x < 0.0f, -x, x); });
    case EXP: return run([](vf x) { return ev::exp(x); });
    case EXPM1: return run([](vf x) { return lanewise(x, [](float a) { return std::expm1(a); }); });
    case LOG: return run([](vf x) { return lanewise(x, [](float a) { return std::log(a); }); });
    case LOG1P: return run([](vf x) { return lanewise(x, [](float a) { return std::log1p(a); }); });
    case SQRT: return run([](vf x) { return lanewise(x, [](float a) { return std::sqrt(a); }); });
    case RSQRT: return run([](vf x) { return lanewise(x, [](float a) { return 1.0f / std::sqrt(a); }); });
    case RECIPROCAL: return run([](vf x) { return 1.0f / x; });
    case SIGMOID: return run([](vf x) { return sigmoid(x); });
    case SILU: return run([](vf x) { return x * sigmoid(x); });
    case TANH: return run([](vf x) { return accurate_tanh(x); });
    case GELU: return run([](vf x) { return lanewise(x, [](float a) { return 0.5f * a * (1 + std::erf(a * 0.70710678f)); }); });
    case GELU_TANH: return run([](vf x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); });
    case RELU: return run([](vf x) { return select(x < 0.0f, vf{}, x); });  // NaN stays NaN, here and below
    case SOFTPLUS: return run([](vf x) { return softplus(x); });
    case LOG_SIGMOID: return run([](vf x) { return -softplus(-x); });
    case ELU: return run([](vf x) {
      return select(x > 0.0f, x, lanewise(select(x > 0.0f, vf{}, x), [](float a) { return std::expm1(a); }));
    });
    case SIN: return run([](vf x) { return lanewise(x, [](float a) { return std::sin(a); }); });
    case COS: return run([](vf x) { return lanewise(x, [](float a) { return std::cos(a); }); });
    case NOT: return run([](vf x) { return truth(x == 0.0f); });
    case POWER:
      if (s == 2.0f) return run([](vf x) { return x * x; });
      return run([s](vf x) { return lanewise(x, [s](float a) { return std::pow(a, s); }); });
    case CLAMP: return run([s, t](vf x) {
      const vf low = splat(s), high = splat(t);
      return select(x < low, low, select(x > high, high, x));
    });
  }
}

void map2(const Instruction &i, Share share) {
  const auto run = [&](auto f) { map<2>(i, share, [f](vf *v) { return f(v[0], v[1]); }); };
  switch (i.code) {
    case ADD: return run([](vf x, vf y) { return x + y; });
    case SUB: return run([](vf x, vf y) { return x - y; });
    case MUL: return run([](vf x, vf y) { return x * y; });
    case DIV: return run([](vf x, vf y) { return x / y; });
    case MAXIMUM: return run([](vf x, vf y) { return select((x > y) | (x != x), x, y); });
    case MINIMUM: return run([](vf x, vf y) { return select((x < y) | (x != x), x, y); });
    case LT: return run([](vf x, vf y) { return truth(x < y); });
    case LE: return run([](vf x, vf y) { return truth(x <= y); });
    case GT: return run([](vf x, vf y) { return truth(x > y); });
    case GE: return run([](vf x, vf y) { return truth(x >= y); });
    case EQ: return run([](vf x, vf y) { return truth(x == y); });
    case NE: return run([](vf x, vf y) { return truth(x != y); });
    case AND: return run([](vf x, vf y) { return x * y; });
    case OR: return run([](vf x, vf y) { return select(x > y, x, y); });
  }
}

void map3(const Instruction &i, Share share) {
  if (i.code == WHERE)
    map<3>(i, share, [](vf *v) { return select(v[0] != 0.0f, v[1], v[2]); });
  else
    map<3>(i, share, [](vf *v) { return v[0] + v[1] * v[2]; });
}

// Along the last axis: SUM, MEAN, MAX, or the NORM (the root of the sum of squares).
void reduce(const Instruction &i, Share share) {
  const int64_t rows = i.size[0] * i.size[1] * i.size[2], length = i.size[3];
  for (int64_t row = share.begin(rows); row < share.end(rows); row++) {
    const int64_t at[3] = {row / (i.size[1] * i.size[2]), row / i.size[2] % i.size[1], row % i.size[2]};
    const auto place = [&](const Ref &r) { return r.at + at[0] * r.stride[0] + at[1] * r.stride[1] + at[2] * r.stride[2]; };
    const float *in = place(i.in[0]);
    const int64_t stride = i.in[0].stride[3];
    vf total{};
    float most = -INFINITY;
    for (int64_t k = 0; k < length; k += W) {
      const int n = lanes(length - k);
      const vf v = load(in + k * stride, stride, n);
      if (i.code == MAX)
        for (int j = 0; j < n; j++) most = v[j] > most || std::isnan(v[j]) ? v[j] : most;
      else if (stride == 0 && n < W)
        for (int j = 0; j < n; j++) total[j] += i.code == NORM ? v[j] * v[j] : v[j];
      else
        total += i.code == NORM ? v * v : v;
    }
    const float all = sum(total);
    *place(i.out) = i.code == MAX ? most : i.code == MEAN ? all / float(length) : i.code == NORM ? std::sqrt(all) : all;
  }
}

// out[g, i, j] = sum_k a[g, i, k] b[g, k, j]; size = {G, I, J, K}. Both orders of b run along its dense axis.
void matmul(const Instruction &p, Share share) {
  const int64_t rows = p.size[0] * p.size[1], J = p.size[2], K = p.size[3];
  const Ref &a = p.in[0], &b = p.in[1];
  for (int64_t row = share.begin(rows); row < share.end(rows); row++) {
    const int64_t g = row / p.size[1], i = row % p.size[1];
    const float *left = a.at + g * a.stride[0] + i * a.stride[1], *right = b.at + g * b.stride[0];
    float *out = p.out.at + g * p.out.stride[0] + i * p.out.stride[1];
    if (b.stride[2] == 1)
      for (int64_t j = 0; j < J; j += W) {
        const int n = lanes(J - j);
        vf total{};
        for (int64_t k = 0; k < K; k++) total += left[k * a.stride[2]] * load(right + k * b.stride[1] + j, n);
        store(out + j * p.out.stride[2], p.out.stride[2], total, n);
      }
    else
      for (int64_t j = 0; j < J; j++) {
        vf total{};
        for (int64_t k = 0; k < K; k += W) {
          const int n = lanes(K - k);
          vf x = load(left + k * a.stride[2], a.stride[2], n), y = load(right + k * b.stride[1] + j * b.stride[2], b.stride[1], n);
          if (n < W && (a.stride[2] == 0 || b.stride[1] == 0))
            for (int l = n; l < W; l++) x[l] = 0;
          total += x * y;
        }
        out[j * p.out.stride[2]] = sum(total);
      }
  }
}

// The weights that a thread will read next, fetched while it would else wait: memory is what decoding lacks.
struct Fetch {
  static constexpr int64_t MOST = 256 << 10, PIECE = 4 * 64;  // bytes: of one matrix, of one call
  const char *from = nullptr, *to = nullptr;
  void begin(Bytes bytes) {
    from = bytes.from;
    to = bytes.to - bytes.from > MOST ? bytes.from + MOST : bytes.to;
  }
  bool piece() {
    if (from >= to) return false;
    for (int64_t at = 0; at < PIECE; at += 64) __builtin_prefetch(from + at, 0, 2);
    from += PIECE;
    return true;
  }
};

Product matrix(const Instruction &i) { return {i.number[0], i.number[1], i.number[2], i.raw[0], i.raw[1]}; }

// The outputs that one thread computes, in blocks of 32.
struct Outputs {
  int64_t begin, end;
};
Outputs outputs(const Instruction &i, Share share) {
  const int64_t blocks = (i.number[1] + 31) / 32, end = share.end(blocks) * 32;
  return {share.begin(blocks) * 32, end < i.number[1] ? end : i.number[1]};
}

// Rows `tokens` of the embedding.
void embed(const Instruction &i, const int64_t *tokens) {
  for (int64_t b = 0; b < i.size[0]; b++) product_unpack(matrix(i), tokens[b], tokens[b] + 1, i.out.at + b * i.out.stride[0]);
}

// Channels of all rows, in runs of 16 so that no two threads write to one line of memory.
template <class F>
void channel_runs(int64_t batch, int64_t channels, Share share, F f) {
  const int64_t runs = (channels + 15) / 16, all = batch * runs;
  for (int64_t task = share.begin(all); task < share.end(all);) {
    const int64_t b = task / runs, first = task % runs;
    const int64_t last = first + share.end(all) - task < runs ? first + share.end(all) - task : runs;
    f(b, first * 16, last * 16 < channels ? last * 16 : channels);
    task += last - first;
  }
}

void conv(const Instruction &i, Share share) {
  channel_runs(i.size[0], i.size[1], share, [&](int64_t b, int64_t begin, int64_t end) {
    conv_step(b, begin, end, i.size[1], i.size[2], i.number[0], i.in[0], i.in[1].at, i.in[2].at, i.in[3].at, i.out);
  });
}

void scan(const Instruction &i, Share share) {
  channel_runs(i.size[0], i.size[1], share, [&](int64_t b, int64_t begin, int64_t end) {
    scan_step(b, begin, end, i.size[1], i.size[2], i.in[0], i.in[1], i.in[2], i.in[3], i.in[4].at, i.in[5].at, i.in[6].at,
              i.out);
  });
}

void heads(const Instruction &i, Share share) {
  float few[256];
  std::vector<float> many(i.size[2] > 256 ? i.size[2] : 0);
  float *decay = many.empty() ? few : many.data();  // of every key
  const int64_t H = i.size[1], all = i.size[0] * H;
  for (int64_t task = share.begin(all); task < share.end(all); task++)
    if (i.code == ATTEND)
      attend_step({H, i.number[1], i.size[2], i.size[3], i.number[0], i.in[0], i.in[1], i.in[2], i.in[3], i.in[4], i.out,
                   i.in[5].at}, task / H, task % H, decay);
    else
      delta_step({H, i.size[2], i.size[3], i.number[0], i.in[0], i.in[1], i.in[2], i.in[3], i.in[4], i.in[5], i.out,
                  i.in[6].at}, task / H, task % H, decay);
}

// int64 numbers: out = in + number[0].
void count(const Instruction &i) {
  for (int64_t k = 0; k < i.size[0]; k++) ((int64_t *)i.out.at)[k] = ((const int64_t *)i.in[0].at)[k] + i.number[0];
}

// Counts as numbers.
void number(const Instruction &i) {
  for (int64_t k = 0; k < i.size[0]; k++) i.out.at[k] = float(((const int64_t *)i.in[0].at)[k]);
}

// Cosines and sines of counts times frequencies, in fp64: an angle of a million radians has lost two digits in fp32.
void turn(const Instruction &i) {
  const double *frequencies = (const double *)i.raw[0];
  for (int64_t k = 0; k < i.size[0]; k++)
    for (int64_t f = 0; f < i.size[1]; f++) {
      const double angle = double(((const int64_t *)i.in[0].at)[k]) * frequencies[f];
      i.out.at[k * i.size[1] + f] = float(std::cos(angle));
      i.in[1].at[k * i.size[1] + f] = float(std::sin(angle));
    }
}

// The first R channels of every head turned: y_c = x_c cos_c + x_{c + R/2 mod R} sin_c, the others copied.
// size = {rows, heads, K, R}; cosines and sines [rows R].
void rotate(const Instruction &i) {
  const int64_t R = i.size[3], half = R / 2;
  const Ref &x = i.in[0], &cosines = i.in[1], &sines = i.in[2];
  for (int64_t b = 0; b < i.size[0]; b++)
    for (int64_t h = 0; h < i.size[1]; h++) {
      const float *from = x.at + b * x.stride[0] + h * x.stride[1];
      const float *c = cosines.at + b * cosines.stride[0], *s = sines.at + b * sines.stride[0];
      float *to = i.out.at + b * i.out.stride[0] + h * i.out.stride[1];
      for (int64_t k = 0; k < half; k++) {
        to[k] = from[k] * c[k] + from[k + half] * s[k];
        to[k + half] = from[k + half] * c[k + half] + from[k] * s[k + half];
      }
      for (int64_t k = R; k < i.size[2]; k++) to[k] = from[k];
    }
}

// One token of a long convolution: y_c = sum_s past_s kernel_{n - s}, over the n + 1 inputs that a row has kept, the new
// one included, which is appended. size = {rows, C}; in: x, counts n, the rows' memory [S C], and where the kernel
// [room C] lies, lag 0 last, and its room. Summed in runs of 256 slots.
template <class T>
struct History {
  const Instruction &i;
  int64_t channels() const { return i.size[1]; }

  void append(T *to, int64_t b, int64_t begin, int64_t end) const {
    const Ref &x = i.in[0];
    for (int64_t c = begin; c < end; c += W) {
      const int n = lanes(end - c);
      store(to + c, load(x.at + b * x.stride[0] + c * x.stride[1], x.stride[1], n), n);
    }
  }

  // 64 channels at most.
  void filter(int64_t b, int64_t begin, int64_t end) const {
    const int64_t n = ((const int64_t *)i.in[1].at)[b], *kernel = (const int64_t *)i.in[3].at;
    T *past = ((T *const *)i.in[2].at)[b];
    const float *weights = (const float *)kernel[0] + (kernel[1] - n - 1) * channels();
    append(past + n * channels(), b, begin, end);
    vf y[64 / W] = {};
    for (int64_t first = 0; first <= n; first += 256) {
      vf run[64 / W] = {};
      for (int64_t s = first; s < (n + 1 < first + 256 ? n + 1 : first + 256); s++)
        for (int64_t c = begin, k = 0; c < end; c += W, k++) {
          const int l = lanes(end - c);
          run[k] += load(past + s * channels() + c, l) * load(weights + s * channels() + c, l);
        }
      for (int64_t k = 0; k < 64 / W; k++) y[k] += run[k];
    }
    for (int64_t c = begin, k = 0; c < end; c += W, k++)
      store(i.out.at + b * i.out.stride[0] + c * i.out.stride[1], i.out.stride[1], y[k], lanes(end - c));
  }
};
template <class T>
void history_of(const Instruction &i, Share share) {
  const int64_t C = i.size[1], runs = (C + 63) / 64, all = i.size[0] * runs;
  for (int64_t task = share.begin(all); task < share.end(all); task++) {
    const int64_t begin = task % runs * 64;
    History<T>{i}.filter(task / runs, begin, begin + 64 < C ? begin + 64 : C);
  }
}
void history(const Instruction &i, Share share) { i.number[0] ? history_of<bf16>(i, share) : history_of<float>(i, share); }

template <class T>
AttentionStep<T> attention(const Instruction &i) {
  const int64_t groups = i.number[0];
  return {i.size[0], groups, i.size[1] / groups, i.size[2], i.size[3], i.number[1], float(i.scalar[0]), i.in[0], i.in[1],
          i.in[2], i.out, (const int64_t *)i.in[3].at, (T *const *)i.in[4].at, (T *const *)i.in[5].at, i.in[6].at};
}
template <class T>
void attention_parts(const Instruction &i, Share share) {
  const AttentionStep<T> step = attention<T>(i);
  const int64_t all = step.tasks();
  step.parts(share.begin(all), share.end(all));
}
template <class T>
void attention_merge(const Instruction &i, Share share) {
  const AttentionStep<T> step = attention<T>(i);
  const int64_t all = step.batch * step.heads();
  step.merge(share.begin(all), share.end(all));
}

void perform(const Instruction &i, Share share, const int64_t *tokens) {
  if (i.code < ADD) return map1(i, share);
  if (i.code < WHERE) return map2(i, share);
  if (i.code <= ADDCMUL) return map3(i, share);
  switch (i.code) {
    case SUM: case MEAN: case MAX: case NORM: return reduce(i, share);
    case MATMUL: return matmul(i, share);
    case EMBED: return embed(i, tokens);
    case PREPARE: return product_prepare(matrix(i), i.size[0], i.in[0].at, i.in[0].stride[0], (void *)i.out.at);
    case PRODUCT: {
      const Outputs part = outputs(i, share);
      return product_rows(matrix(i), i.size[0], (const void *)i.in[0].at, part.begin, part.end, i.out.at, i.out.stride[0]);
    }
    case CONV: return conv(i, share);
    case SCAN: return scan(i, share);
    case ATTEND: case DELTA: return heads(i, share);
    case COUNT: return count(i);
    case NUMBER: return number(i);
    case TURN: return turn(i);
    case ROTATE: return rotate(i);
    case SLOTS_: return i.number[2] ? attention_parts<bf16>(i, share) : attention_parts<float>(i, share);
    case MERGE: return i.number[2] ? attention_merge<bf16>(i, share) : attention_merge<float>(i, share);
    case HISTORY: return history(i, share);
  }
}

}  // namespace

extern "C" {

int64_t ev_program_instruction_bytes() { return sizeof(Instruction); }

// `tokens` has `rows` ids. Returns 0: nothing here asks for memory.
int64_t ev_program_run(const Instruction *program, int64_t length, const int64_t *tokens, int64_t rows, int64_t threads) {
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    const int64_t id = omp_get_thread_num(), threads = omp_get_num_threads();  // as many as were really given
    Fetch next;
    const auto fetch_after = [&](int64_t i) {  // the thread's part of the first product behind instruction i
      do i++;
      while (i < length && program[i].code != PRODUCT);
      if (i == length || !(program[i].shared || id == 0)) return;
      const Outputs part = outputs(program[i], program[i].shared ? Share{id, threads} : Share{0, 1});
      next.begin(product_bytes(matrix(program[i]), part.begin, part.end));
    };
    fetch_after(-1);
    for (int64_t i = 0; i < length; i++) {
      const bool shared = program[i].shared;
      if (shared)
        perform(program[i], {id, threads}, tokens);
      else if (id == 0)
        perform(program[i], {0, 1}, tokens);
      if (program[i].code == PRODUCT) fetch_after(i);
      if (i + 1 < length && (shared || program[i + 1].shared)) barrier.meet(threads, [&] { return next.piece(); });
    }
  }
  return 0;
}

}  // extern "C"

// Selective scan (Mamba):  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,   y_t = sum_k h_t C_t + D x_t.
// dt_t = softplus(given dt_t + bias) where there is a bias.
//
// Channels lie across the lanes, the K states of a lane in K registers, time is the inner loop. The forward
// pass keeps the states at every CHUNK-th token; the backward pass recomputes the others from them.
#include <vector>

#include "instruction.h"
#include "memory.h"
#include "vec.h"

using namespace ev;

namespace {

constexpr int CHUNK = 32;  // tokens between two kept states

// Tokens between a prefetch and its use. Few: neighbours in time lie a whole row apart, often in one set of the first cache.
constexpr int AHEAD = 4;

inline void fetch(const void *p) { __builtin_prefetch(p); }  // harmless beyond the end

struct Shape {
  int64_t batch, time, channels, keys;
};

// The matrix rows [channel + lane, k] as one vector per k.
inline void gather(const float *rows, int64_t keys, int lanes, vf *out) {
  for (int64_t k = 0; k < keys; k++) {
    vf v{};
    for (int i = 0; i < lanes; i++) v[i] = rows[i * keys + k];
    out[k] = v;
  }
}
inline void scatter(float *rows, int64_t keys, int lanes, const vf *in) {
  for (int64_t k = 0; k < keys; k++)
    for (int i = 0; i < lanes; i++) rows[i * keys + k] = in[k][i];
}

// Where the states before token t are kept: [batch, chunks, blocks of channels, K, lanes], as the vectors lie.
template <class P>
P *kept_at(P *kept, const Shape s, int64_t b, int64_t t, int64_t c) {
  const int64_t chunks = (s.time + CHUNK - 1) / CHUNK, padded = (s.channels + 15) / 16 * 16;
  return kept + ((b * chunks + t / CHUNK) * padded + c) * s.keys;
}

// The steps of one token; `steep` (where there is a bias) is how they change with what was given.
struct Steps {
  const float *bias;
  vf of(vf given, int64_t c, int n) const { return bias ? softplus(given + load(bias + c, n)) : given; }
  vf steep(vf given, int64_t c, int n) const { return bias ? sigmoid(given + load(bias + c, n)) : splat(1.0f); }
};

template <class T, int FIXED>
void forward_block(const Shape s, int64_t b, int64_t c, const T *x, const T *dt, const Steps steps, const float *A,
                   const float *B, const float *C, const float *D, const float *state, const uint8_t *starts, T *y, float *final_state, float *kept) {
  constexpr int MAX = FIXED ? FIXED : 256;
  const int64_t K = FIXED ? FIXED : s.keys;
  const int lanes = int(s.channels - c < W ? s.channels - c : W);
  vf a[MAX], h[MAX];
  gather(A + c * K, K, lanes, a);
  for (int64_t k = 0; k < K; k++) a[k] *= LOG2E;
  gather(state + (b * s.channels + c) * K, K, lanes, h);
  const vf skip = D ? load(D + c, lanes) : vf{};
  for (int64_t t = 0; t < s.time; t++) {
    const int64_t at = b * s.time + t, soon = (at + AHEAD) * s.channels + c;
    fetch(x + soon), fetch(dt + soon);
    if (kept && t % CHUNK == 0) std::memcpy(kept_at(kept, s, b, t, c), h, K * sizeof(vf));
    if (starts && starts[at])
      for (int64_t k = 0; k < K; k++) h[k] = vf{};
    const vf step = steps.of(load(dt + at * s.channels + c, lanes), c, lanes), in = load(x + at * s.channels + c, lanes);
    const vf push = step * in;
    vf out = skip * in;
    for (int64_t k = 0; k < K; k++) {
      h[k] = exp2_decay(step * a[k]) * h[k] + push * B[at * K + k];
      out += h[k] * C[at * K + k];
    }
    store(y + at * s.channels + c, out, lanes);
  }
  scatter(final_state + (b * s.channels + c) * K, K, lanes, h);
}

template <class T, int FIXED>
void forward(const Shape s, const T *x, const T *dt, const Steps steps, const float *A, const float *B, const float *C,
             const float *D, const float *state, const uint8_t *starts, T *y, float *final_state, float *kept, int64_t threads) {
  const int64_t blocks = (s.channels + W - 1) / W;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t b = 0; b < s.batch; b++)
    for (int64_t i = 0; i < blocks; i++)
      forward_block<T, FIXED>(s, b, i * W, x, dt, steps, A, B, C, D, state, starts, y, final_state, kept);
}

inline float quarter(vf v, int j) {  // the sum of every fourth lane from j on
  float total = 0;
  for (int i = j; i < W; i += 4) total += v[i];
  return total;
}

constexpr int GROUP = 4;  // states done together in the backward pass: their chunk stays in the first cache

// Working memory of one task of the backward pass.
struct Work {
  std::vector<vf> A, lambda, gA, gD, gB, gC;  // gB and gC: [groups of states, tokens], four states to a vector
  vf step[CHUNK], in[CHUNK], push[CHUNK], given[CHUNK], g[CHUNK], g_push[CHUNK], g_step[CHUNK];
  vf h[(CHUNK + 1) * GROUP], e[CHUNK * GROUP];
  Work(int64_t blocks, int64_t K)
      : A(blocks * K), lambda(blocks * K), gA(blocks * K), gD(blocks), gB((K + 3) / 4 * CHUNK), gC((K + 3) / 4 * CHUNK) {}
};

template <class T>
struct Backward {
  Shape s;
  const T *x, *dt, *gy;
  const Steps steps;
  const float *B, *C, *A, *D, *kept, *gfinal;
  const uint8_t *starts;
  float *gx, *gdt, *gA, *gB, *gC, *gD, *gstate;  // gA [B C K], gD [B C], gB and gC [groups B T K]: summed by the caller

  // States k to k + G of one chunk of time of one block of channels: forwards once more, then backwards.
  template <int G>
  void states(int64_t at, int64_t length, int64_t k, const vf *kept_h, const vf *a, vf *lambda, vf *gA_sum, Work &w) const {
    vf h[G], scaled[G];
    for (int j = 0; j < G; j++) w.h[j] = h[j] = kept_h[j], scaled[j] = a[j] * LOG2E;
    for (int64_t i = 0; i < length; i++) {
      const vf step = w.step[i], push = w.push[i];
      const float *b = B + (at + i) * s.keys + k;
      const bool start = starts && starts[at + i];
#pragma GCC unroll 4
      for (int j = 0; j < G; j++) {
        const vf e = start ? vf{} : exp2_decay(step * scaled[j]);
        w.e[i * G + j] = e;
        w.h[(i + 1) * G + j] = h[j] = e * h[j] + push * b[j];
      }
    }
    vf l[G], gA_here[G];
    for (int j = 0; j < G; j++) l[j] = lambda[j], gA_here[j] = gA_sum[j];
    for (int64_t i = length - 1; i >= 0; i--) {
      const vf step = w.step[i], push = w.push[i], g = w.g[i];
      const float *b = B + (at + i) * s.keys + k, *c = C + (at + i) * s.keys + k;
      vf g_push = w.g_push[i], g_step = w.g_step[i], to_b[4] = {}, to_c[4] = {};
#pragma GCC unroll 4
      for (int j = 0; j < G; j++) {
        to_c[j] = g * h[j];
        l[j] += g * c[j];
        to_b[j] = l[j] * push;
        g_push += l[j] * b[j];
        l[j] *= w.e[i * G + j];
        h[j] = w.h[i * G + j];
        const vf p = l[j] * h[j];
        g_step += p * a[j];
        gA_here[j] += p * step;
      }
      w.gB[k / 4 * CHUNK + i] += quarters(to_b[0], to_b[1], to_b[2], to_b[3]);
      w.gC[k / 4 * CHUNK + i] += quarters(to_c[0], to_c[1], to_c[2], to_c[3]);
      w.g_push[i] = g_push, w.g_step[i] = g_step;
    }
    for (int j = 0; j < G; j++) lambda[j] = l[j], gA_sum[j] = gA_here[j];
  }

  // One chunk of time of one block of channels, backwards.
  void chunk(int64_t b, int64_t c, int64_t begin, int64_t end, const vf *a, vf *lambda, vf *gA_sum, vf &gD_sum,
             Work &w) const {
    const int64_t K = s.keys, N = s.channels, at = b * s.time + begin, length = end - begin;
    const int lanes = int(N - c < W ? N - c : W);
    vf before[256];
    std::memcpy(before, kept_at(kept, s, b, begin, c), K * sizeof(vf));
    for (int64_t k = 0; k < K; k++) fetch(kept_at(kept, s, b, begin, c + W) + k * W);
    for (int64_t i = 0; i < length; i++) {
      const int64_t from = (at + i) * N + c;
      fetch(x + from + W), fetch(dt + from + W), fetch(gy + from + W);  // of the next block
      w.given[i] = load(dt + from, lanes), w.step[i] = steps.of(w.given[i], c, lanes);
      w.in[i] = load(x + from, lanes), w.g[i] = load(gy + from, lanes);
      w.push[i] = w.step[i] * w.in[i], w.g_push[i] = w.g_step[i] = vf{};
    }
    int64_t k = 0;
    for (; k + GROUP <= K; k += GROUP) states<GROUP>(at, length, k, before + k, a + k, lambda + k, gA_sum + k, w);
    if (K - k == 3) states<3>(at, length, k, before + k, a + k, lambda + k, gA_sum + k, w);
    if (K - k == 2) states<2>(at, length, k, before + k, a + k, lambda + k, gA_sum + k, w);
    if (K - k == 1) states<1>(at, length, k, before + k, a + k, lambda + k, gA_sum + k, w);
    const vf skip = D ? load(D + c, lanes) : vf{};
    for (int64_t i = 0; i < length; i++) {
      const int64_t to = (at + i) * N + c;
      fetch(gx + to + W), fetch(gdt + to + W);
      gD_sum += w.g[i] * w.in[i];
      store(gx + to, w.step[i] * w.g_push[i] + skip * w.g[i], lanes);
      store(gdt + to, (w.in[i] * w.g_push[i] + w.g_step[i]) * steps.steep(w.given[i], c, lanes), lanes);
    }
  }

  void task(int64_t b, int64_t group, int64_t first, int64_t last) const {
    const int64_t K = s.keys, N = s.channels;
    Work work(last - first, K);
    for (int64_t j = first; j < last; j++) {
      const int lanes = int(N - j * W < W ? N - j * W : W);
      gather(gfinal + (b * N + j * W) * K, K, lanes, &work.lambda[(j - first) * K]);
      gather(A + j * W * K, K, lanes, &work.A[(j - first) * K]);
    }
    for (int64_t begin = ((s.time + CHUNK - 1) / CHUNK - 1) * CHUNK; begin >= 0; begin -= CHUNK) {
      const int64_t end = begin + CHUNK < s.time ? begin + CHUNK : s.time;
      for (auto &v : work.gB) v = vf{};
      for (auto &v : work.gC) v = vf{};
      for (int64_t j = first; j < last; j++) {
        const int64_t own = j - first;
        chunk(b, j * W, begin, end, &work.A[own * K], &work.lambda[own * K], &work.gA[own * K], work.gD[own], work);
      }
      const int64_t base = ((group * s.batch + b) * s.time + begin) * K;
      for (int64_t i = 0; i < end - begin; i++)
        for (int64_t k = 0; k < K; k++) {
          gB[base + i * K + k] = quarter(work.gB[k / 4 * CHUNK + i], k % 4);
          gC[base + i * K + k] = quarter(work.gC[k / 4 * CHUNK + i], k % 4);
        }
    }
    for (int64_t j = first; j < last; j++) {
      const int lanes = int(N - j * W < W ? N - j * W : W);
      scatter(gstate + (b * N + j * W) * K, K, lanes, &work.lambda[(j - first) * K]);
      scatter(gA + (b * N + j * W) * K, K, lanes, &work.gA[(j - first) * K]);
      store(gD + b * N + j * W, work.gD[j - first], lanes);
    }
  }

  void run(int groups, int threads) const {
    const int64_t blocks = (s.channels + W - 1) / W;
    Attempts memory;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < s.batch; b++)
      for (int64_t group = 0; group < groups; group++)
        memory.attempt([&] { task(b, group, blocks * group / groups, blocks * (group + 1) / groups); });
    memory.check();
  }
};

template <class T>
void forward_any(const Shape s, const void *x, const void *dt, const float *bias, const float *A, const float *B, const float *C,
                 const float *D, const float *state, const uint8_t *starts, void *y, float *final_state, float *kept,
                 int threads) {
  auto run = s.keys == 16 ? forward<T, 16> : s.keys == 8 ? forward<T, 8> : forward<T, 0>;
  run(s, (const T *)x, (const T *)dt, {bias}, A, B, C, D, state, starts, (T *)y, final_state, kept, int(threads));
}

}  // namespace

// ---- one token in a program ----

namespace {

// Mamba: h = exp(dt A) h + dt x B^T, y = h C + D x for channels begin..end of row b; A [C K], state [B C K].
// B and C are contiguous along K.
void scan_step(int64_t b, int64_t begin, int64_t end, int64_t channels, int64_t keys, const Ref &x, const Ref &dt,
                      const Ref &B, const Ref &C, const float *A, const float *D, float *state, const Ref &y) {
  const float *in_b = B.at + b * B.stride[0], *out_c = C.at + b * C.stride[0];
  for (int64_t c = begin; c < end; c++) {
    const float value = x.at[b * x.stride[0] + c * x.stride[1]], step = dt.at[b * dt.stride[0] + c * dt.stride[1]];
    float *h = state + (b * channels + c) * keys;
    vf total{};
    for (int64_t k = 0; k < keys; k += W) {
      const int n = lanes(keys - k);
      const vf decay = ev::exp(splat(step) * load(A + c * keys + k, n));
      const vf now = decay * load(h + k, n) + (step * value) * load(in_b + k, n);
      store(h + k, now, n);
      total += now * load(out_c + k, n);
    }
    y.at[b * y.stride[0] + c * y.stride[1]] = sum(total) + (D ? D[c] * value : 0.0f);
  }
}

void scan(const Instruction &i, Share share, const int64_t *) {
  channel_runs(i.size[0], i.size[1], share, [&](int64_t b, int64_t begin, int64_t end) {
    scan_step(b, begin, end, i.size[1], i.size[2], i.in[0], i.in[1], i.in[2], i.in[3], i.in[4].at, i.in[5].at, i.in[6].at,
              i.out);
  });
}
const Register scan_kind("scan", scan);

}  // namespace

extern "C" {

int ev_selective_scan_chunk() { return CHUNK; }

int64_t ev_selective_scan(int64_t half, int64_t batch, int64_t time, int64_t channels, int64_t keys, const void *x,
                       const void *dt, const float *bias, const float *A, const float *B, const float *C, const float *D, const float *state,
                       const uint8_t *starts, void *y, float *final_state, float *kept, int64_t threads) {
  return status([&] {
    auto run = half ? forward_any<bf16> : forward_any<float>;
    run({batch, time, channels, keys}, x, dt, bias, A, B, C, D, state, starts, y, final_state, kept, int(threads));
  });
}

int64_t ev_selective_scan_backward(int64_t half, int64_t batch, int64_t time, int64_t channels, int64_t keys, const void *x,
                                const void *dt, const float *bias, const float *A, const float *B, const float *C, const float *D,
                                const float *kept, const uint8_t *starts, const void *gy, const float *gfinal, float *gx,
                                float *gdt, float *gA, float *gB, float *gC, float *gD, float *gstate, int64_t groups,
                                int64_t threads) {
  return status([&] {
    const Shape s{batch, time, channels, keys};
    if (half)
      Backward<bf16>{s, (const bf16 *)x, (const bf16 *)dt, (const bf16 *)gy, {bias}, B, C, A, D, kept,
                     gfinal, starts, gx, gdt, gA, gB, gC, gD, gstate}.run(int(groups), int(threads));
    else
      Backward<float>{s, (const float *)x, (const float *)dt, (const float *)gy, {bias}, B, C, A, D,
                      kept, gfinal, starts, gx, gdt, gA, gB, gC, gD, gstate}.run(int(groups), int(threads));
  });
}

}  // extern "C"

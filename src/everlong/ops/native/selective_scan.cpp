// Selective scan (Mamba):  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,   y_t = sum_k h_t C_t + D x_t.
// dt_t = softplus(given dt_t + bias) where there is a bias.
//
// Channels lie across the lanes, the K states of a lane in K registers, time is the inner loop. The forward
// pass keeps the states at every CHUNK-th token; the backward pass recomputes the others from them.
#include <vector>

#include "vec.h"

using namespace ev;

namespace {

constexpr int CHUNK = 32;  // tokens between two kept states

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
  const int64_t chunks = (s.time + CHUNK - 1) / CHUNK;
  for (int64_t t = 0; t < s.time; t++) {
    const int64_t at = b * s.time + t;
    if (kept && t % CHUNK == 0) scatter(kept + ((b * chunks + t / CHUNK) * s.channels + c) * K, K, lanes, h);
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

// Working memory of one task of the backward pass.
struct Work {
  std::vector<vf> lambda, gA, gD, h, e, gB, gC;
  Work(int64_t blocks, int64_t K)
      : lambda(blocks * K), gA(blocks * K), gD(blocks), h((CHUNK + 1) * K), e(CHUNK * K), gB(CHUNK * K), gC(CHUNK * K) {}
};

template <class T>
struct Backward {
  Shape s;
  const T *x, *dt, *gy;
  const Steps steps;
  const float *B, *C, *A, *D, *kept, *gfinal;
  const uint8_t *starts;
  float *gx, *gdt, *gA, *gB, *gC, *gD, *gstate;  // gA [B C K], gD [B C], gB and gC [groups B T K]: summed by the caller

  // One chunk of time of one block of channels, backwards.
  template <int FIXED>
  void chunk(int64_t b, int64_t c, int64_t begin, int64_t end, vf *lambda, vf *gA_sum, vf &gD_sum, Work &work) const {
    constexpr int MAX = FIXED ? FIXED : 256;
    const int64_t K = FIXED ? FIXED : s.keys, N = s.channels;
    const int lanes = int(N - c < W ? N - c : W);
    const int64_t chunks = (s.time + CHUNK - 1) / CHUNK;
    vf a[MAX];
    gather(A + c * K, K, lanes, a);
    vf *h = work.h.data(), *e = work.e.data();
    gather(kept + ((b * chunks + begin / CHUNK) * N + c) * K, K, lanes, h);
    for (int64_t t = begin; t < end; t++) {
      const int64_t at = b * s.time + t, i = t - begin;
      const vf step = steps.of(load(dt + at * N + c, lanes), c, lanes), push = step * load(x + at * N + c, lanes);
      const bool first = starts && starts[at];
      for (int64_t k = 0; k < K; k++) {
        e[i * K + k] = first ? vf{} : exp2_decay(step * a[k] * LOG2E);
        h[(i + 1) * K + k] = e[i * K + k] * h[i * K + k] + push * B[at * K + k];
      }
    }
    const vf skip = D ? load(D + c, lanes) : vf{};
    for (int64_t t = end - 1; t >= begin; t--) {
      const int64_t at = b * s.time + t, i = t - begin;
      const vf given = load(dt + at * N + c, lanes), step = steps.of(given, c, lanes);
      const vf in = load(x + at * N + c, lanes), g = load(gy + at * N + c, lanes);
      const vf push = step * in;
      vf g_push{}, g_step{};
      for (int64_t k = 0; k < K; k++) {
        work.gC[i * K + k] += g * h[(i + 1) * K + k];
        const vf l = lambda[k] + g * C[at * K + k];
        work.gB[i * K + k] += l * push;
        g_push += l * B[at * K + k];
        lambda[k] = l * e[i * K + k];
        const vf p = lambda[k] * h[i * K + k];
        g_step += p * a[k];
        gA_sum[k] += p * step;
      }
      gD_sum += g * in;
      store(gx + at * N + c, step * g_push + skip * g, lanes);
      store(gdt + at * N + c, (in * g_push + g_step) * steps.steep(given, c, lanes), lanes);
    }
  }

  template <int FIXED>
  void task(int64_t b, int64_t group, int64_t first, int64_t last) const {
    const int64_t K = FIXED ? FIXED : s.keys, N = s.channels;
    Work work(last - first, K);
    for (int64_t j = first; j < last; j++)
      gather(gfinal + (b * N + j * W) * K, K, int(N - j * W < W ? N - j * W : W), &work.lambda[(j - first) * K]);
    for (int64_t begin = (s.time - 1) / CHUNK * CHUNK; begin >= 0; begin -= CHUNK) {
      const int64_t end = begin + CHUNK < s.time ? begin + CHUNK : s.time;
      for (auto &v : work.gB) v = vf{};
      for (auto &v : work.gC) v = vf{};
      for (int64_t j = first; j < last; j++) {
        const int64_t own = j - first;
        chunk<FIXED>(b, j * W, begin, end, &work.lambda[own * K], &work.gA[own * K], work.gD[own], work);
      }
      const int64_t base = ((group * s.batch + b) * s.time + begin) * K;
      for (int64_t i = 0; i < (end - begin) * K; i++) {
        gB[base + i] = sum(work.gB[i]);
        gC[base + i] = sum(work.gC[i]);
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
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < s.batch; b++)
      for (int64_t group = 0; group < groups; group++) {
        const int64_t first = blocks * group / groups, last = blocks * (group + 1) / groups;
        if (s.keys == 16)
          task<16>(b, group, first, last);
        else
          task<0>(b, group, first, last);
      }
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

extern "C" {

int ev_selective_scan_chunk() { return CHUNK; }

void ev_selective_scan(int64_t half, int64_t batch, int64_t time, int64_t channels, int64_t keys, const void *x,
                       const void *dt, const float *bias, const float *A, const float *B, const float *C, const float *D, const float *state,
                       const uint8_t *starts, void *y, float *final_state, float *kept, int64_t threads) {
  auto run = half ? forward_any<bf16> : forward_any<float>;
  run({batch, time, channels, keys}, x, dt, bias, A, B, C, D, state, starts, y, final_state, kept, int(threads));
}

void ev_selective_scan_backward(int64_t half, int64_t batch, int64_t time, int64_t channels, int64_t keys, const void *x,
                                const void *dt, const float *bias, const float *A, const float *B, const float *C, const float *D,
                                const float *kept, const uint8_t *starts, const void *gy, const float *gfinal, float *gx,
                                float *gdt, float *gA, float *gB, float *gC, float *gD, float *gstate, int64_t groups,
                                int64_t threads) {
  const Shape s{batch, time, channels, keys};
  if (half)
    Backward<bf16>{s, (const bf16 *)x, (const bf16 *)dt, (const bf16 *)gy, {bias}, B, C, A, D, kept,
                   gfinal, starts, gx, gdt, gA, gB, gC, gD, gstate}.run(int(groups), int(threads));
  else
    Backward<float>{s, (const float *)x, (const float *)dt, (const float *)gy, {bias}, B, C, A, D,
                    kept, gfinal, starts, gx, gdt, gA, gB, gC, gD, gstate}.run(int(groups), int(threads));
}

}  // extern "C"

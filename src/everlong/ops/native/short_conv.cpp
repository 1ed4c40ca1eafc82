// Short causal depthwise convolution:  z_t = bias + sum_j taps_j x_{t-j},  y_t = z_t or silu(z_t), per channel.
//
// Rows of all channels are the inner loop, so memory is read once and in order. The backward pass computes z again
// from x, a chunk of tokens at a time, and keeps the gradient of z of that chunk in the cache.
#include <vector>

#include "instruction.h"
#include "memory.h"
#include "vec.h"

using namespace ev;

namespace {

constexpr int64_t CHUNK = 32;   // tokens of one task
constexpr int64_t BLOCK = 512;  // channels of one task of the backward pass

template <class T>
struct Conv {
  int64_t batch, time, channels, width;
  const T *x;  // x[b * x_batch + t * x_time + c]
  int64_t x_batch, x_time;
  const T *state;             // [B width-1 C], the inputs before the first
  const float *taps, *bias;   // [width C], the last one for the current token; [C]
  const uint8_t *starts;      // [B T] or null
  bool silu;

  const T *row(int64_t b, int64_t t) const {
    return t < 0 ? state + (b * (width - 1) + width - 1 + t) * channels : x + b * x_batch + t * x_time;
  }
  const float *tap(int64_t j) const { return taps + (width - 1 - j) * channels; }
  // How many taps of token t lie in its document.
  int64_t reach(int64_t b, int64_t t) const {
    int64_t n = 1;
    while (n < width && !(starts && t - n + 1 >= 0 && starts[b * time + t - n + 1])) n++;
    return n;
  }
  int lanes(int64_t c, int64_t end) const { return int(end - c < W ? end - c : W); }

  // z of one token at channels c to c + n, from the rows of its taps.
  vf convolve(const T *const *rows, int64_t reach, int64_t c, int n) const {
    vf z = load(bias + c, n);
    for (int64_t j = 0; j < reach; j++) z += load(rows[j] + c, n) * load(tap(j) + c, n);
    return z;
  }

  void rows_of(int64_t b, int64_t t, int64_t reach, const T **rows) const {
    for (int64_t j = 0; j < reach; j++) rows[j] = row(b, t - j);
  }

  void forward(T *y, int64_t threads) const {
    const int64_t chunks = (time + CHUNK - 1) / CHUNK;
    Attempts memory;
#pragma omp parallel num_threads(threads)
    {
      std::vector<const T *> rows;
      memory.attempt([&] { rows.resize(width); });
#pragma omp for schedule(static)
      for (int64_t q = 0; q < batch * chunks; q++)
        memory.attempt([&] { chunk(q / chunks, q % chunks * CHUNK, rows.data(), y); });
    }
    memory.check();
  }

  void chunk(int64_t b, int64_t begin, const T **rows, T *y) const {
    const int64_t end = begin + CHUNK < time ? begin + CHUNK : time;
    for (int64_t t = begin; t < end; t++) {
      const int64_t n = reach(b, t);
      rows_of(b, t, n, rows);
      T *out = y + (b * time + t) * channels;
      if (n == 4)
        silu ? whole<4, true>(rows, out) : whole<4, false>(rows, out);
      else
        part(rows, n, 0, out);
    }
  }

  // y of one token from channel c on.
  void part(const T *const *rows, int64_t reach, int64_t c, T *y) const {
    for (; c < channels; c += W) {
      const int n = lanes(c, channels);
      const vf z = convolve(rows, reach, c, n);
      store(y + c, silu ? z * ev::sigmoid(z) : z, n);
    }
  }

  // The same for the usual case, with everything that the loop needs in registers.
  template <int N, bool SILU>
  void whole(const T *const *rows, T *y) const {
    const T *in[N];
    const float *by[N], *add = bias;
    for (int j = 0; j < N; j++) in[j] = rows[j], by[j] = tap(j);
    const int64_t end = channels / W * W, ahead = x_time, row = channels;
    for (int64_t c = 0; c < end; c += W) {
      vf z = load(add + c);
      for (int j = 0; j < N; j++) z += load(in[j] + c) * load(by[j] + c);
      __builtin_prefetch(in[0] + ahead + c);  // the next token's row: the hardware looks no further than a page
      __builtin_prefetch(y + row + c, 1);
      store(y + c, SILU ? z * ev::sigmoid(z) : z);
    }
    part(rows, N, end, y);
  }
};

template <class T>
struct Backward {
  Conv<T> conv;
  const T *gy;
  T *gx;
  float *gtaps, *gbias, *gstate;  // [groups width C], [groups C] (summed by the caller), [B width-1 C]

  // The gradient of z of one token at channels c to c1, and what it adds to those of taps and bias (sums, or null).
  void inner(const T *const *rows, int64_t reach, const T *g_row, int64_t c0, int64_t c, int64_t c1, float *gz,
             float *sums) const {
    for (; c < c1; c += W) {
      const int n = conv.lanes(c, c1);
      vf g = load(g_row + c, n);
      if (conv.silu) g *= slope(conv.convolve(rows, reach, c, n));
      store(gz + c - c0, g, n);
      if (!sums) continue;
      for (int64_t j = 0; j < reach; j++) add(sums + j * (c1 - c0) + c - c0, g * load(rows[j] + c, n), n);
      add(sums + conv.width * (c1 - c0) + c - c0, g, n);
    }
  }
  // The same for the usual case, with everything that the loop needs in registers.
  template <int N, bool SILU>
  void inner_whole(const T *const *rows, const T *g_row, int64_t c0, int64_t c1, float *gz, float *sums) const {
    const int64_t block = c1 - c0, end = c0 + block / W * W, ahead = conv.x_time, row = conv.channels;
    const T *in[N];
    const float *by[N], *bias = conv.bias;
    for (int j = 0; j < N; j++) in[j] = rows[j], by[j] = conv.tap(j);
    for (int64_t c = c0; c < end; c += W) {
      __builtin_prefetch(in[0] + ahead + c);
      __builtin_prefetch(g_row + row + c);
      vf g = load(g_row + c), z = load(bias + c), x[N];
      for (int j = 0; j < N; j++) {
        x[j] = load(in[j] + c);
        z += x[j] * load(by[j] + c);
      }
      if (SILU) g *= slope(z);
      store(gz + c - c0, g);
      if (!sums) continue;
      for (int j = 0; j < N; j++) add(sums + j * block + c - c0, g * x[j], W);
      add(sums + N * block + c - c0, g, W);
    }
    inner(rows, N, g_row, c0, end, c1, gz, sums);
  }
  static vf slope(vf z) {
    const vf p = ev::sigmoid(z);
    return p + z * p * (1.0f - p);
  }
  static void add(float *sum, vf v, int n) { store(sum, load(sum, n) + v, n); }

  // The gradient of the input at position t (of the state where t < 0), from that of z of tokens begin to end.
  template <class Out>
  void outer(int64_t b, int64_t t, int64_t begin, int64_t end, int64_t c0, int64_t c1, const float *gz, Out *out,
             std::vector<const float *> &from) const {
    const Conv<T> &s = conv;
    int64_t taps = 0;
    for (int64_t j = 0; j < s.width; j++) {
      const bool reached = t + j >= begin && t + j < end && s.reach(b, t + j) > j;
      from[j] = reached ? gz + (t + j - begin) * (c1 - c0) - c0 : nullptr;
      taps += reached;
    }
    int64_t c = c0;
    if (taps == 4 && s.width == 4)
      for (const float *g[] = {from[0], from[1], from[2], from[3]}, *by[] = {s.tap(0), s.tap(1), s.tap(2), s.tap(3)};
           c + W <= c1; c += W) {
        __builtin_prefetch(out + s.channels + c, 1);
        store(out + c, load(g[0] + c) * load(by[0] + c) + load(g[1] + c) * load(by[1] + c) +
                           load(g[2] + c) * load(by[2] + c) + load(g[3] + c) * load(by[3] + c));
      }
    for (; c < c1; c += W) {
      const int n = s.lanes(c, c1);
      vf g{};
      for (int64_t j = 0; j < s.width; j++)
        if (from[j]) g += load(s.tap(j) + c, n) * load(from[j] + c, n);
      store(out + c, g, n);
    }
  }

  void chunk(int64_t b, int64_t begin, int64_t c0, int64_t c1, float *gz, float *sums, std::vector<const T *> &rows,
             std::vector<const float *> &from) const {
    const Conv<T> &s = conv;
    const int64_t own = begin + CHUNK < s.time ? begin + CHUNK : s.time;
    const int64_t end = own + s.width - 1 < s.time ? own + s.width - 1 : s.time;
    for (int64_t t = begin; t < end; t++) {
      const int64_t reach = s.reach(b, t);
      s.rows_of(b, t, reach, rows.data());
      const T *g_row = gy + (b * s.time + t) * s.channels;
      float *mine = gz + (t - begin) * (c1 - c0), *add_to = t < own ? sums : nullptr;  // the rest: the next chunk's
      if (reach == 4 && s.width == 4)
        s.silu ? inner_whole<4, true>(rows.data(), g_row, c0, c1, mine, add_to)
               : inner_whole<4, false>(rows.data(), g_row, c0, c1, mine, add_to);
      else
        inner(rows.data(), reach, g_row, c0, c0, c1, mine, add_to);
    }
    for (int64_t t = begin; t < own; t++)
      outer(b, t, begin, end, c0, c1, gz, gx + (b * s.time + t) * s.channels, from);
    for (int64_t t = begin ? 0 : 1 - s.width; t < 0; t++)
      outer(b, t, begin, end, c0, c1, gz, gstate + (b * (s.width - 1) + s.width - 1 + t) * s.channels, from);
  }

  void run(int64_t groups, int64_t threads) const {
    const Conv<T> &s = conv;
    const int64_t chunks = (s.time + CHUNK - 1) / CHUNK, tasks = s.batch * chunks;
    Attempts memory;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t group = 0; group < groups; group++)
      memory.attempt([&] {
      std::vector<float> gz((CHUNK + s.width - 1) * BLOCK), sums((s.width + 1) * BLOCK);
      std::vector<const T *> rows(s.width);
      std::vector<const float *> from(s.width);
      for (int64_t c0 = 0; c0 < s.channels; c0 += BLOCK) {
        const int64_t c1 = c0 + BLOCK < s.channels ? c0 + BLOCK : s.channels, size = (c1 - c0) * sizeof(float);
        for (auto &sum : sums) sum = 0;
        for (int64_t q = tasks * group / groups; q < tasks * (group + 1) / groups; q++)
          chunk(q / chunks, q % chunks * CHUNK, c0, c1, gz.data(), sums.data(), rows, from);
        for (int64_t j = 0; j < s.width; j++)
          std::memcpy(gtaps + (group * s.width + s.width - 1 - j) * s.channels + c0, &sums[j * (c1 - c0)], size);
        std::memcpy(gbias + group * s.channels + c0, &sums[s.width * (c1 - c0)], size);
      }
      });
    memory.check();
  }
};

}  // namespace

// ---- one token in a program ----

namespace {

// y = bias + sum_j weight_j window_j over the last W inputs, with SiLU where `silu`; the window moves on by one.
// weight [W C], state [B W-1 C]; channels begin..end of row b.
void conv_step(int64_t b, int64_t begin, int64_t end, int64_t channels, int64_t width, bool silu, const Ref &x,
                      const float *weight, const float *bias, float *state, const Ref &y) {
  float *window = state + b * (width - 1) * channels;
  for (int64_t c = begin; c < end; c += W) {
    const int n = lanes(end - c);
    vf sum = bias ? load(bias + c, n) : vf{};
    for (int64_t j = 0; j + 1 < width; j++) {
      const vf old = load(window + j * channels + c, n);
      sum += old * load(weight + j * channels + c, n);
      if (j) store(window + (j - 1) * channels + c, old, n);
    }
    const vf in = load(x.at + b * x.stride[0] + c * x.stride[1], x.stride[1], n);
    sum += in * load(weight + (width - 1) * channels + c, n);
    if (width > 1) store(window + (width - 2) * channels + c, in, n);
    store(y.at + b * y.stride[0] + c * y.stride[1], y.stride[1], silu ? sum * sigmoid(sum) : sum, n);
  }
}

void conv(const Instruction &i, Share share, const int64_t *) {
  channel_runs(i.size[0], i.size[1], share, [&](int64_t b, int64_t begin, int64_t end) {
    conv_step(b, begin, end, i.size[1], i.size[2], i.number[0], i.in[0], i.in[1].at, i.in[2].at, i.in[3].at, i.out);
  });
}
const Register conv_kind("conv", conv);

}  // namespace

extern "C" {

int64_t ev_short_conv(int64_t half, int64_t silu, int64_t batch, int64_t time, int64_t channels, int64_t width,
                   const void *x, int64_t x_batch, int64_t x_time, const void *state, const float *taps,
                   const float *bias, const uint8_t *starts, void *y, int64_t threads) {
  return status([&] {
    if (half)
      Conv<bf16>{batch, time, channels, width, (const bf16 *)x, x_batch, x_time, (const bf16 *)state, taps, bias, starts,
                 silu != 0}.forward((bf16 *)y, threads);
    else
      Conv<float>{batch, time, channels, width, (const float *)x, x_batch, x_time, (const float *)state, taps, bias,
                  starts, silu != 0}.forward((float *)y, threads);
  });
}

int64_t ev_short_conv_backward(int64_t half, int64_t silu, int64_t batch, int64_t time, int64_t channels, int64_t width,
                            const void *x, int64_t x_batch, int64_t x_time, const void *state, const float *taps,
                            const float *bias, const uint8_t *starts, const void *gy, void *gx, float *gtaps,
                            float *gbias, float *gstate, int64_t groups, int64_t threads) {
  return status([&] {
    if (half)
      Backward<bf16>{{batch, time, channels, width, (const bf16 *)x, x_batch, x_time, (const bf16 *)state, taps, bias,
                      starts, silu != 0}, (const bf16 *)gy, (bf16 *)gx, gtaps, gbias, gstate}.run(groups, threads);
    else
      Backward<float>{{batch, time, channels, width, (const float *)x, x_batch, x_time, (const float *)state, taps, bias,
                       starts, silu != 0}, (const float *)gy, (float *)gx, gtaps, gbias, gstate}.run(groups, threads);
  });
}

}  // extern "C"

// Products of a few rows with one weight matrix:  y[b, o] = sum_i w[o, i] x[b, i],  w in fp32, bf16, int8 or int4.
//
// fp32 and bf16 are read as they lie, [out, in]; bf16 rounds x to bf16 too. Integers are packed for the lanes of a
// vector: 16 outputs side by side, four inputs of each in 32 bits, inputs padded to a multiple of 32 and outputs to
// one of 16, so a block of 16 outputs is one stream of memory.
//   INT8  bytes w + 128, [out/16][in/4][16][4]; scale fp32 [out]
//   INT4  values w + 8, two to a byte: [out/16][in/32][4][16][4], the low half for inputs 8j..8j+3 of a group of 32,
//         the high half for inputs 8j+4..8j+7; scale bf16 [out/16][in/32][16]
// For these x becomes 8-bit digits, two for INT8 (as good as 15 bits), one with a scale for each group for INT4; their
// products are summed exactly in int32, over a whole row or a group. The sums of one row of x are taken in one order,
// whatever else is in the batch and however the outputs are split.
#pragma once
#include "instruction.h"
#include "product_formats.h"

namespace ev {

namespace product {

// Memory that is read next, line by line: 8 KiB ahead into the first cache, 64 KiB ahead into the third. Streams of bf16
// and int4 else wait for memory a tenth of the time; those of fp32 and int8 do not.
inline void ahead(const void *line) {
  __builtin_prefetch((const char *)line + (8 << 10));
  __builtin_prefetch((const char *)line + (64 << 10), 0, 1);
}

// OUT outputs of ROWS rows; every sum runs over the inputs in the same order in every tile.
template <class K, int OUT, int ROWS>
inline void dots(const Product &p, const char *x, int64_t row_bytes, int64_t o, float *y, int64_t y_stride) {
  const auto *w = (const typename K::Weight *)p.weight + o * p.in;
  vf sum[OUT][ROWS] = {};
  int64_t k = 0;
  for (; k + K::STEP <= p.in; k += K::STEP) {
    typename K::V weight[OUT];
    EV_UNROLL
    for (int j = 0; j < OUT; j++) {
      weight[j] = K::weight(w + j * p.in + k);
      if (sizeof(*w) == 2)
        ahead(w + OUT * k + j * K::STEP);  // as the tile lies in memory
      else
        __builtin_prefetch(w + OUT * (p.in + k) + j * K::STEP);  // the next tile
    }
    EV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const auto in = K::input(x + r * row_bytes, k);
      EV_UNROLL
      for (int j = 0; j < OUT; j++) sum[j][r] = K::add(sum[j][r], weight[j], in);
    }
  }
  if (k < p.in)
    EV_UNROLL
    for (int j = 0; j < OUT; j++) {
      const auto weight = K::weight(w + j * p.in + k, int(p.in - k));
      EV_UNROLL
      for (int r = 0; r < ROWS; r++) sum[j][r] = K::add(sum[j][r], weight, K::input(x + r * row_bytes, k));
    }
  EV_UNROLL
  for (int r = 0; r < ROWS; r++)
    EV_UNROLL
    for (int j = 0; j < OUT; j++) y[r * y_stride + o + j] = total(sum[j][r]);
}

inline void write(const Product &p, int64_t o, const vf *result, float *y) {
  const int n = int(p.out - o < LANES ? p.out - o : LANES);
  for (int i = 0; i < LANES / W; i++)
    if (i * W < n) store(y + o + i * W, result[i], n - i * W < W ? n - i * W : W);
}

template <int BLOCKS, int ROWS>
inline void int8_tile(const Product &p, const char *x, int64_t row_bytes, int64_t o, float *y, int64_t y_stride) {
  const int64_t steps = padded(p.in, GROUP) / 4;
  const auto *w = (const uint8_t *)p.weight + o * steps * 4;
  const Int::Digit *in[ROWS];
  Int::Sums high[BLOCKS][ROWS] = {}, low[BLOCKS][ROWS] = {};
  EV_UNROLL
  for (int r = 0; r < ROWS; r++) in[r] = digits(x + r * row_bytes);
  for (int64_t k = 0; k < steps; k++) {
    Int::Chunk chunk[BLOCKS];
    EV_UNROLL
    for (int j = 0; j < BLOCKS; j++) {
      chunk[j] = Int::bytes(w + (j * steps + k) * 64);
      __builtin_prefetch(w + ((BLOCKS + j) * steps + k) * 64);
    }
    EV_UNROLL
    for (int r = 0; r < ROWS; r++)
      EV_UNROLL
      for (int j = 0; j < BLOCKS; j++) {
        high[j][r] = Int::add(high[j][r], chunk[j], in[r] + 8 * k);
        low[j][r] = Int::add(low[j][r], chunk[j], in[r] + 8 * k + 4);
      }
  }
  EV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const Row &row = *(const Row *)(x + r * row_bytes);
    EV_UNROLL
    for (int j = 0; j < BLOCKS; j++) {
      const Sixteen h = Int::lanes(high[j][r]), l = Int::lanes(low[j][r]);
      vf result[LANES / W];
      EV_UNROLL
      for (int i = 0; i < LANES / W; i++) {
        const vf scale = load((const float *)p.scale + o + j * LANES + i * W);
        const vf sum = __builtin_convertvector(h.part[i] - 128 * row.high, vf) * 128.0f +
                       __builtin_convertvector(l.part[i] - 128 * row.low, vf);
        result[i] = sum * scale * row.scale;
      }
      write(p, o + j * LANES, result, y + r * y_stride);
    }
  }
}

template <int BLOCKS, int ROWS>
inline void int4_tile(const Product &p, const char *x, int64_t row_bytes, int64_t o, float *y, int64_t y_stride) {
  const int64_t groups = padded(p.in, GROUP) / GROUP;
  const auto *w = (const uint8_t *)p.weight + o * groups * 16;
  const auto *scales = (const bf16 *)p.scale + o * groups;
  const Scaled x0 = scaled(p, x);
  vf sum[BLOCKS][ROWS][LANES / W] = {};
  for (int64_t g = 0; g < groups; g++) {
    Int::Sums dot[BLOCKS][ROWS] = {};
    if (g % 2 == 0) __builtin_prefetch(scales + (BLOCKS * groups + g) * LANES);
    EV_UNROLL
    for (int s = 0; s < 4; s++)
      EV_UNROLL
      for (int j = 0; j < BLOCKS; j++) {
        const uint8_t *from = w + ((j * groups + g) * 4 + s) * 64;
        Int::Chunk first, second;
        Int::halves(from, first, second);
        ahead(from);
        EV_UNROLL
        for (int r = 0; r < ROWS; r++) {
          const auto *in = (const Int::Digit *)((const char *)x0.digits + r * row_bytes) + GROUP * g + 8 * s;
          dot[j][r] = Int::add(Int::add(dot[j][r], first, in), second, in + 4);
        }
      }
    EV_UNROLL
    for (int j = 0; j < BLOCKS; j++)
      EV_UNROLL
      for (int r = 0; r < ROWS; r++) {
        const int32_t offset = ((const int32_t *)((const char *)x0.offset + r * row_bytes))[g];
        const float size = ((const float *)((const char *)x0.scale + r * row_bytes))[g];
        const Sixteen whole = Int::lanes(dot[j][r]);
        EV_UNROLL
        for (int i = 0; i < LANES / W; i++) {
          const vf scale = load(scales + (j * groups + g) * LANES + i * W);
          sum[j][r][i] += __builtin_convertvector(whole.part[i] + offset, vf) * (scale * size);
        }
      }
  }
  EV_UNROLL
  for (int r = 0; r < ROWS; r++)
    EV_UNROLL
    for (int j = 0; j < BLOCKS; j++) write(p, o + j * LANES, sum[j][r], y + r * y_stride);
}

// ---- tiles over the batch ----

template <class K, int OUT>
struct Dense {
  static constexpr int ROWS = W == 16 ? 6 : 3;
  template <int N>
  static void tile(const Product &p, const char *x, int64_t bytes, int64_t o, float *y, int64_t stride) {
    dots<K, OUT, N>(p, x, bytes, o, y, stride);
  }
};
template <int BLOCKS>
struct Eight {
  static constexpr int ROWS = Int::ROWS;
  template <int N>
  static void tile(const Product &p, const char *x, int64_t bytes, int64_t o, float *y, int64_t stride) {
    int8_tile<BLOCKS, N>(p, x, bytes, o, y, stride);
  }
};
template <int BLOCKS>
struct Four {
  static constexpr int ROWS = Int::ROWS;
  template <int N>
  static void tile(const Product &p, const char *x, int64_t bytes, int64_t o, float *y, int64_t stride) {
    int4_tile<BLOCKS, N>(p, x, bytes, o, y, stride);
  }
};

// The whole batch against the outputs from o on, in tiles of like heights.
template <class T>
inline void batched(const Product &p, int64_t batch, const char *x, int64_t bytes, int64_t o, float *y,
                    int64_t stride) {
  for (int64_t b = 0; b < batch;) {
    const int64_t left = batch - b, tiles = (left + T::ROWS - 1) / T::ROWS, rows = (left + tiles - 1) / tiles;
    const char *from = x + b * bytes;
    float *to = y + b * stride;
    if constexpr (T::ROWS >= 6)
      if (rows == 6) T::template tile<6>(p, from, bytes, o, to, stride);
    if constexpr (T::ROWS >= 5)
      if (rows == 5) T::template tile<5>(p, from, bytes, o, to, stride);
    if constexpr (T::ROWS >= 4)
      if (rows == 4) T::template tile<4>(p, from, bytes, o, to, stride);
    if constexpr (T::ROWS >= 3)
      if (rows == 3) T::template tile<3>(p, from, bytes, o, to, stride);
    if constexpr (T::ROWS >= 2)
      if (rows == 2) T::template tile<2>(p, from, bytes, o, to, stride);
    if (rows == 1) T::template tile<1>(p, from, bytes, o, to, stride);
    b += rows;
  }
}

template <class Many, class One>
inline void walk(const Product &p, int64_t batch, const char *x, int64_t bytes, int64_t begin, int64_t end,
                 int64_t many, int64_t one, float *y, int64_t stride) {
  int64_t o = begin;
  for (; o + many <= end; o += many) batched<Many>(p, batch, x, bytes, o, y, stride);
  for (; o < end; o += one) batched<One>(p, batch, x, bytes, o, y, stride);
}

template <class K>
inline void prepare_dense(const Product &p, const float *x, char *row) {
  for (int64_t i = 0; i < p.in; i += K::STEP)
    K::prepare(row + i * K::BYTES, x + i, int(p.in - i < K::STEP ? p.in - i : K::STEP));
}

inline int64_t row_bytes(const Product &p) {
  if (p.kind == FP32) return padded(p.in, Fp32::STEP) * Fp32::BYTES;
  if (p.kind == BF16) return padded(p.in, Bf16::STEP) * Bf16::BYTES;
  if (p.kind == INT8) return sizeof(Row) + padded(p.in, GROUP) * 2 * sizeof(Int::Digit);
  return padded(p.in, GROUP * 16) / GROUP * 8 + padded(p.in, 64) * sizeof(Int::Digit);
}

}  // namespace product

// Bytes of the prepared x.
inline int64_t product_scratch(const Product &p, int64_t batch) { return batch * product::row_bytes(p); }

// Round or quantise rows begin..end of x [batch, in] into ``scratch``; rows do not depend on each other.
inline void product_prepare(const Product &p, int64_t begin, int64_t end, const float *x, int64_t x_stride,
                            void *scratch) {
  using namespace product;
  for (int64_t b = begin; b < end; b++) {
    const float *from = x + b * x_stride;
    char *to = (char *)scratch + b * row_bytes(p);
    if (p.kind == FP32)
      prepare_dense<Fp32>(p, from, to);
    else if (p.kind == BF16)
      prepare_dense<Bf16>(p, from, to);
    else if (p.kind == INT8)
      prepare_row(p, from, to);
    else
      prepare_groups(p, from, to);
  }
}
inline void product_prepare(const Product &p, int64_t batch, const float *x, int64_t x_stride, void *scratch) {
  product_prepare(p, 0, batch, x, x_stride, scratch);
}

// Outputs begin..end of all rows; begin a multiple of 16, end one too or ``out``.
inline void product_rows(const Product &p, int64_t batch, const void *scratch, int64_t begin, int64_t end, float *y,
                         int64_t y_stride) {
  using namespace product;
  const char *x = (const char *)scratch;
  const int64_t bytes = row_bytes(p);
  if (p.kind == FP32)
    walk<Dense<Fp32, 4>, Dense<Fp32, 1>>(p, batch, x, bytes, begin, end, 4, 1, y, y_stride);
  else if (p.kind == BF16)
    walk<Dense<Bf16, 4>, Dense<Bf16, 1>>(p, batch, x, bytes, begin, end, 4, 1, y, y_stride);
  else if (p.kind == INT8)
    batch < Int::SHARED ? walk<Eight<1>, Eight<1>>(p, batch, x, bytes, begin, end, LANES, LANES, y, y_stride)
                   : walk<Eight<2>, Eight<1>>(p, batch, x, bytes, begin, end, 2 * LANES, LANES, y, y_stride);
  else
    batch < Int::SHARED ? walk<Four<1>, Four<1>>(p, batch, x, bytes, begin, end, LANES, LANES, y, y_stride)
                   : walk<Four<2>, Four<1>>(p, batch, x, bytes, begin, end, 2 * LANES, LANES, y, y_stride);
}

// The memory of the weights of outputs begin..end (multiples of 16, or ``out``), without scales.
inline Bytes product_bytes(const Product &p, int64_t begin, int64_t end) {
  const int64_t wide = product::padded(p.in, product::GROUP);
  const int64_t row = p.kind == FP32 ? p.in * 4 : p.kind == BF16 ? p.in * 2 : p.kind == INT8 ? wide : wide / 2;
  return {(const char *)p.weight + begin * row, (const char *)p.weight + end * row};
}

// Rows begin..end of the matrix, dequantised: [end - begin, in] in fp32 or bf16.
template <class T>
inline void product_unpack(const Product &p, int64_t begin, int64_t end, T *rows) {
  using namespace product;
  typedef uint8_t u4 __attribute__((vector_size(4)));
  typedef uint32_t w4 __attribute__((vector_size(16)));
  const int64_t wide = padded(p.in, GROUP);
  for (int64_t o = begin; o < end; o++) {
    T *to = rows + (o - begin) * p.in;
    if (p.kind == FP32 || p.kind == BF16) {
      for (int64_t i = 0; i < p.in; i += W) {
        const int n = int(p.in - i < W ? p.in - i : W);
        const int64_t at = o * p.in + i;
        store(to + i, p.kind == FP32 ? load((const float *)p.weight + at, n) : load((const bf16 *)p.weight + at, n), n);
      }
      continue;
    }
    const int64_t block = o / LANES, lane = o % LANES;
    const float whole = p.kind == INT8 ? ((const float *)p.scale)[o] : 0;
    for (int64_t g = 0; g < wide / GROUP; g++) {
      float values[GROUP];
      const auto *scales = (const bf16 *)p.scale + (block * (wide / GROUP) + g) * LANES;
      const float scale = p.kind == INT8 ? whole : scalar(scales[lane]);
      const int64_t line = p.kind == INT8 ? block * wide / 4 + g * 8 : (block * (wide / GROUP) + g) * 4;
      for (int s = 0; s < GROUP / 4; s++) {
        u4 four;
        std::memcpy(&four, (const uint8_t *)p.weight + (line + (p.kind == INT8 ? s : s / 2)) * 64 + lane * 4, 4);
        w4 u = __builtin_convertvector(four, w4);
        if (p.kind == INT4) u = s % 2 ? u >> 4 : u & 15u;
        typedef int32_t s4 __attribute__((vector_size(16)));
        const v4 v = __builtin_convertvector((s4)u - (p.kind == INT8 ? 128 : 8), v4) * scale;
        std::memcpy(values + 4 * s, &v, 16);
      }
      const int64_t n = p.in - g * GROUP < GROUP ? p.in - g * GROUP : GROUP;
      for (int64_t i = 0; i < n; i += W)
        store(to + g * GROUP + i, load(values + i, int(n - i < W ? n - i : W)), int(n - i < W ? n - i : W));
    }
  }
}

}  // namespace ev

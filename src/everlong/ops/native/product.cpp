// Entry points of product.h: a product on all threads, and rows of the matrix as floats.
#include "instruction.h"
#include "memory.h"
#include "product.h"

using namespace ev;

namespace {

constexpr int64_t SMALL = 1 << 16;  // weights below which one thread is faster than two

// Rows ids[0..count] of the matrix, or 0..count.
template <class T>
void unpack(const Product &p, const int64_t *ids, int64_t count, T *rows, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = ids ? ids[i] : i;
    product_unpack(p, row, row + 1, rows + i * p.in);
  }
}

}  // namespace

// ---- one token in a program ----

namespace {

Product matrix(const Instruction &i) { return {i.number[0], i.number[1], i.number[2], i.raw[0], i.raw[1]}; }

// The outputs of a share, in blocks of 32.
struct Outputs {
  int64_t begin, end;
};
Outputs outputs(const Instruction &i, Share share) {
  const int64_t blocks = (i.number[1] + 31) / 32, end = share.end(blocks) * 32;
  return {share.begin(blocks) * 32, end < i.number[1] ? end : i.number[1]};
}

// Rows `tokens` of the embedding.
void embed(const Instruction &i, Share, const int64_t *tokens) {
  for (int64_t b = 0; b < i.size[0]; b++) product_unpack(matrix(i), tokens[b], tokens[b] + 1, i.out.at + b * i.out.stride[0]);
}

void prepare(const Instruction &i, Share, const int64_t *) {
  product_prepare(matrix(i), i.size[0], i.in[0].at, i.in[0].stride[0], (void *)i.out.at);
}

void rows(const Instruction &i, Share share, const int64_t *) {
  const Outputs part = outputs(i, share);
  product_rows(matrix(i), i.size[0], (const void *)i.in[0].at, part.begin, part.end, i.out.at, i.out.stride[0]);
}

Bytes weights(const Instruction &i, Share share) {
  const Outputs part = outputs(i, share);
  return product_bytes(matrix(i), part.begin, part.end);
}

const Register embed_kind("embed", embed), prepare_kind("prepare", prepare), product_kind("product", rows, weights);

}  // namespace

extern "C" {

int64_t ev_product_scratch(int64_t kind, int64_t out, int64_t in, int64_t batch) {
  return product_scratch({kind, out, in, nullptr, nullptr}, batch);
}

int64_t ev_product(int64_t kind, int64_t out, int64_t in, const void *weight, const void *scale, int64_t batch,
                const float *x, void *scratch, float *y, int64_t threads) {
  return status([&] {
    const Product p{kind, out, in, weight, scale};
    const int64_t blocks = (out + 31) / 32, used = out * in * batch < SMALL ? 1 : threads;
#pragma omp parallel num_threads(used)
    {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < batch; b++) product_prepare(p, b, b + 1, x, in, scratch);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < used; t++) {
        const int64_t begin = blocks * t / used * 32, end = blocks * (t + 1) / used * 32;
        product_rows(p, batch, scratch, begin, end < out ? end : out, y, out);
      }
    }
  });
}

int64_t ev_product_unpack(int64_t kind, int64_t out, int64_t in, const void *weight, const void *scale, const int64_t *ids,
                       int64_t count, int64_t half, void *rows, int64_t threads) {
  return status([&] {
    const Product p{kind, out, in, weight, scale};
    const int64_t used = count * in < SMALL ? 1 : threads;
    if (half)
      unpack(p, ids, count, (bf16 *)rows, used);
    else
      unpack(p, ids, count, (float *)rows, used);
  });
}

}  // extern "C"

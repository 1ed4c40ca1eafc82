// One token of a long convolution, in a program.
#include "instruction.h"

using namespace ev;

namespace {

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
void history(const Instruction &i, Share share, const int64_t *) {
  const int64_t C = i.size[1], runs = (C + 63) / 64, all = i.size[0] * runs;
  for (int64_t task = share.begin(all); task < share.end(all); task++) {
    const int64_t begin = task % runs * 64;
    History<T>{i}.filter(task / runs, begin, begin + 64 < C ? begin + 64 : C);
  }
}
const Register kinds[] = {{"history", history<float>}, {"history of bf16", history<bf16>}};

}  // namespace

// Counts (int64) of a program, and rotary positions made of them.
#include "instruction.h"

using namespace ev;

namespace {

// int64 numbers: out = in + number[0].
void count(const Instruction &i, Share, const int64_t *) {
  for (int64_t k = 0; k < i.size[0]; k++) ((int64_t *)i.out.at)[k] = ((const int64_t *)i.in[0].at)[k] + i.number[0];
}

// Counts as numbers.
void number(const Instruction &i, Share, const int64_t *) {
  for (int64_t k = 0; k < i.size[0]; k++) i.out.at[k] = float(((const int64_t *)i.in[0].at)[k]);
}

// Cosines and sines of counts times frequencies, in fp64: an angle of a million radians has lost two digits in fp32.
void turn(const Instruction &i, Share, const int64_t *) {
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
void rotate(const Instruction &i, Share, const int64_t *) {
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

const Register kinds[] = {{"count", count}, {"number", number}, {"turn", turn}, {"rotate", rotate}};

}  // namespace

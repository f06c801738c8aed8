// Decoding of tiles, one row at a time; formats/tiles.py describes the layout.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>

#include "plans.h"

namespace q6k {

using Bf16 = c10::BFloat16;
using Fp16 = c10::Half;

constexpr int GROUP = 16, GROUPS = 16, HIGH_BYTES = 2048, SCALES_AT = 3072, STEPS_AT = 3328;

// Where the byte of four groups of a row, lane t, element b lies among the low pairs; among the high nibbles it is
// at `4 * h * 256 + 512 * c` more, c the half of the groups.
struct Place {
  int h, lane, b;
  int low(int quad) const { return HIGH_BYTES + 512 * h + 16 * lane + 4 * quad + b; }
  int high(int pair) const { return (2 * h + pair / 4) * 512 + 16 * lane + 4 * (pair % 4) + b; }
};

// Calls `use(element, place)` for the 16 elements of a group in row `r`.
template <typename Use>
void for_elements(int r, Use use) {
  for (int t = 0; t < 4; ++t) {
    for (int b = 0; b < 4; ++b) use(2 * t + (b & 1) + 8 * (b >> 1), Place{r / 8, 4 * (r % 8) + t, b});
  }
}

// q of row `r`, -32..31.
inline void read_codes(const unsigned char* tile, int r, signed char (&q)[SUPER_BLOCK]) {
  for_elements(r, [&](int element, Place place) {
    for (int group = 0; group < GROUPS; ++group) {
      const int high = tile[place.high(group / 2)] >> (4 * (group & 1)) & 15;
      const int low = tile[place.low(group / 4)] >> (2 * (group & 3)) & 3;
      const int v = high << 2 | low;
      q[group * GROUP + element] = static_cast<signed char>(v < 32 ? v : v - 64);
    }
  });
}

// The scales of the row's groups, in fp32 without rounding.
inline void read_scales(const unsigned char* tile, int r, const WeightType& type, float (&s)[GROUPS]) {
  if (type.scales == SCALES_STEPPED) {
    Fp16 step;
    std::memcpy(&step, tile + STEPS_AT + 2 * r, sizeof step);
    for (int j = 0; j < GROUPS; ++j) {
      s[j] = static_cast<float>(tile[SCALES_AT + 16 * r + j] - 128) * static_cast<float>(step);
    }
  } else {
    Bf16 scales[GROUPS];
    std::memcpy(static_cast<void*>(scales), tile + SCALES_AT + 32 * r, sizeof scales);
    for (int j = 0; j < GROUPS; ++j) s[j] = static_cast<float>(scales[j]);
  }
}

// Rounded once to `T`.
template <typename T>
void read_weights(const unsigned char* tile, int r, const WeightType& type, T* weights) {
  signed char q[SUPER_BLOCK];
  float s[GROUPS];
  read_codes(tile, r, q);
  read_scales(tile, r, type, s);
  for (int i = 0; i < SUPER_BLOCK; ++i) weights[i] = static_cast<T>(static_cast<float>(q[i]) * s[i / GROUP]);
}

}  // namespace q6k

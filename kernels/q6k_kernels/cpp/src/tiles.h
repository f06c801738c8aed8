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

constexpr int SIXTEENS = 16, MOST_GROUPS = 16, OTHERS_AT = 2048;

// Where a tile has the code of a row's element of a sixteen: `count` bits of `byte` from bit `from` on, which are those of
// the code from bit `to` on; if some are elsewhere, likewise `other`.
struct Bits {
  int byte, from, to, count;
};
struct Place {
  Bits first, other;
};

inline Place place_of(int r, int sixteen, int element, const WeightType& type) {
  const int h = r / 8, q = sixteen / 4, s = sixteen % 4, b = (element & 1) + 2 * (element / 8);
  const int lane = 4 * (r % 8) + element % 8 / 2, rest = static_cast<int>(type.bits) - 4;
  if (type.bits == 8) return {{(4 * h + q) * 512 + 16 * lane + 4 * s + b, 0, 0, 8}, {0, 0, 0, 0}};
  if (type.book) {
    return {{(2 * h + q / 2) * 512 + 16 * lane + 8 * (q & 1) + 2 * s + b / 2, 4 * (b & 1), 0, 4}, {0, 0, 0, 0}};
  }
  const int word = 2 * q + (s & 1);
  const bool low = s < 2;  // the four bits in one place are the code's low ones
  const Bits four = {(2 * h + word / 4) * 512 + 16 * lane + 4 * (word % 4) + b, low ? 0 : 4, low ? 0 : rest, 4};
  const int field = 2 * rest * (s & 1) + (low ? rest : 0);
  if (rest == 1) {
    return {four, {OTHERS_AT + 256 * h + 8 * lane + 4 * (q / 2) + b, 4 * (q & 1) + field, low ? 4 : 0, 1}};
  }
  if (rest == 2) return {four, {OTHERS_AT + 512 * h + 16 * lane + 4 * q + b, field, low ? 4 : 0, 2}};
  return {four, {0, 0, 0, 0}};
}

// Calls `use(i, place)` for the weights of row `r`.
template <typename Use>
void for_weights(int r, const WeightType& type, Use use) {
  for (int i = 0; i < SUPER_BLOCK; ++i) use(i, place_of(r, i / 16, i % 16, type));
}

// The codes of row `r`: stored ones minus the offset, or looked up.
inline void read_codes(const unsigned char* tile, int r, const WeightType& type, signed char (&codes)[SUPER_BLOCK]) {
  const auto part = [&](const Bits& bits) { return (tile[bits.byte] >> bits.from & ((1 << bits.count) - 1)) << bits.to; };
  for_weights(r, type, [&](int i, const Place& place) {
    const int stored = part(place.first) | part(place.other);
    codes[i] = type.book ? BOOKS[type.book][stored] : static_cast<signed char>(stored - type.offset);
  });
}

inline float half_e8m0(int e) {  // 2^(e - 128)
  return std::ldexp(1.0f, e - 128);
}

// The scales of the row's groups, or with `minimum` their minimums, in fp32 without rounding.
inline void read_scales(const unsigned char* tile, int r, const WeightType& type, bool minimum, float (&s)[MOST_GROUPS]) {
  const PlaneArray* const arrays = type.arrays + (type.count - type.scale_count);
  const int groups = static_cast<int>(SUPER_BLOCK / type.group);
  const PlaneArray& scales = arrays[minimum ? 1 : 0];
  const unsigned char* const from = tile + scales.at + r * groups * scales.bytes;
  float step = 1.0f;
  if (type.scales == SCALES_INT8_STEPS || type.scales == SCALES_UINT8_STEPS) {
    const PlaneArray& steps = arrays[(type.minimum ? 2 : 1) + (minimum ? 1 : 0)];
    Fp16 half = 0.0f;
    std::memcpy(&half, tile + steps.at + 2 * r, sizeof half);
    step = static_cast<float>(half);
  }
  for (int j = 0; j < groups; ++j) {
    Bf16 bf16 = 0.0f;
    Fp16 fp16 = 0.0f;
    switch (type.scales) {
      case SCALES_BF16:
        std::memcpy(static_cast<void*>(&bf16), from + 2 * j, sizeof bf16);
        s[j] = static_cast<float>(bf16);
        break;
      case SCALES_FP16:
        std::memcpy(static_cast<void*>(&fp16), from + 2 * j, sizeof fp16);
        s[j] = static_cast<float>(fp16);
        break;
      case SCALES_E8M0:
        s[j] = half_e8m0(from[j]);
        break;
      default:
        s[j] = static_cast<float>(type.scales == SCALES_INT8_STEPS ? from[j] - 128 : from[j]) * step;
    }
  }
}

// Rounded once to `T`.
template <typename T>
void read_weights(const unsigned char* tile, int r, const WeightType& type, T (&weights)[SUPER_BLOCK]) {
  signed char codes[SUPER_BLOCK];
  float scales[MOST_GROUPS], least[MOST_GROUPS] = {};
  read_codes(tile, r, type, codes);
  read_scales(tile, r, type, false, scales);
  if (type.minimum) read_scales(tile, r, type, true, least);
  for (int i = 0; i < SUPER_BLOCK; ++i) {
    const int64_t j = i / type.group;
    const float product = static_cast<float>(codes[i]) * scales[j];
    weights[i] = static_cast<T>(type.minimum ? product - least[j] : product);
  }
}

}  // namespace q6k

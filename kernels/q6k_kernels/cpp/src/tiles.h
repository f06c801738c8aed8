// Weights in tiles and in planes, one row of a super-block at a time: the layouts of formats/tiles.py and
// formats/planes.py.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <string_view>

#include "plans.h"

namespace q6k {

using Bf16 = c10::BFloat16;
using Fp16 = c10::Half;

constexpr int LEAST_GROUP = 16, MOST_GROUPS = SUPER_BLOCK / LEAST_GROUP;
constexpr int HIGH_AT = 2048;  // of the bits of a code that are not among its four in one place

// Some bits of a byte of a tile.
struct Place {
  int byte, shift;
};

// The codes of types with that many bits, looked up in a book or not.
template <int BITS, bool BOOK>
struct Codes {
  static constexpr int HIGH_BITS = BITS < 8 ? BITS - 4 : 0, HIGH_MASK = (1 << HIGH_BITS) - 1;

  // Element 2t + (b & 1) + 8(b >> 1) of sixteen 4q + s of row g + 8h is the lane's (4g + t) element b.
  struct Element {
    int h, lane, q, s, b;
  };

  // Calls `use(column, element)` for all 256 elements of row `r`.
  template <typename Use>
  static void for_elements(int r, Use use) {
    for (int t = 0; t < 4; ++t) {
      for (int b = 0; b < 4; ++b) {
        const int within = 2 * t + (b & 1) + 8 * (b >> 1);
        for (int q = 0; q < 4; ++q) {
          for (int s = 0; s < 4; ++s) use(64 * q + 16 * s + within, Element{r / 8, 4 * (r % 8) + t, q, s, b});
        }
      }
    }
  }

  // Of four bits of a code, or of all eight.
  static Place top(const Element& e) {
    if (BITS == 8) return {(4 * e.h + e.q) * 512 + 16 * e.lane + 4 * e.s + e.b, 0};
    const int half = (2 * e.h + e.q / 2) * 512 + 16 * e.lane + 8 * (e.q & 1);
    if (BOOK) return {half + 2 * e.s + e.b / 2, 4 * (e.b & 1)};
    return {half + 4 * (e.s & 1) + e.b, 4 * (e.s >> 1)};
  }
  // Of the others.
  static Place high(const Element& e) {
    const int lane = HIGH_AT + HIGH_BITS * (256 * e.h + 8 * e.lane), below = HIGH_BITS * (1 - e.s / 2);
    if (HIGH_BITS == 2) return {lane + 4 * e.q + e.b, 4 * (e.s & 1) + below};
    return {lane + 4 * (e.q / 2) + e.b, 4 * (e.q & 1) + 2 * (e.s & 1) + below};
  }

  // The stored codes of row `r` of a tile.
  static void read(const unsigned char* tile, int r, unsigned char (&codes)[SUPER_BLOCK]) {
    for_elements(r, [&](int column, const Element& e) {
      const Place at = top(e);
      int code = BITS == 8 ? tile[at.byte] : tile[at.byte] >> at.shift & 15;
      if (HIGH_BITS) {
        const Place other = high(e);
        const int rest = tile[other.byte] >> other.shift & HIGH_MASK;
        code = e.s < 2 ? code | rest << 4 : code << HIGH_BITS | rest;
      }
      codes[column] = static_cast<unsigned char>(code);
    });
  }
  // Into a tile whose codes are zero.
  static void write(const unsigned char (&codes)[SUPER_BLOCK], int r, unsigned char* tile) {
    for_elements(r, [&](int column, const Element& e) {
      const int code = codes[column];
      const Place at = top(e);
      if (BITS == 8) {
        tile[at.byte] = codes[column];
        return;
      }
      const bool split_below = HIGH_BITS && e.s >= 2;
      tile[at.byte] |= static_cast<unsigned char>((split_below ? code >> HIGH_BITS : code & 15) << at.shift);
      if (HIGH_BITS) {
        const Place other = high(e);
        tile[other.byte] |= static_cast<unsigned char>((split_below ? code & HIGH_MASK : code >> 4) << other.shift);
      }
    });
  }
  // The stored code of a column of a super-block of planes.
  static int of_planes(const unsigned char* first, const unsigned char* second, int column) {
    if (BITS == 8) return first[column];
    int code = first[column / 2] >> (4 * (column & 1)) & 15;
    if (HIGH_BITS == 1) code |= (second[column / 8] >> (column % 8 / 2 + 4 * (column & 1)) & 1) << 4;
    if (HIGH_BITS == 2) {
      // Chunks of 32 weights: byte w the even ones of 8w..8w+7, byte 4 + w the odd ones.
      const int within = column % 32, byte = column / 32 * 8 + within / 8 + 4 * (within & 1);
      code |= (second[byte] >> (within % 8 / 2 * 2) & 3) << 4;
    }
    return code;
  }
};

// Calls `use` with an object of the `Codes` of a weight type.
template <typename Use>
void with_codes(const WeightType& type, Use use) {
  if (type.book) return use(Codes<4, true>());
  if (type.bits == 4) return use(Codes<4, false>());
  if (type.bits == 5) return use(Codes<5, false>());
  if (type.bits == 6) return use(Codes<6, false>());
  return use(Codes<8, false>());
}

// The codes of row `r` of a tile: minus their offset, or looked up.
inline void read_codes(const unsigned char* tile, int r, const WeightType& type, signed char (&q)[SUPER_BLOCK]) {
  unsigned char stored[SUPER_BLOCK];
  with_codes(type, [&](auto codes) { codes.read(tile, r, stored); });
  const signed char* const book = BOOKS[type.book];
  for (int i = 0; i < SUPER_BLOCK; ++i) {
    q[i] = type.book ? book[stored[i]] : static_cast<signed char>(stored[i] - type.offset);
  }
}

// 2^(e - 128); two of them are subnormal.
inline float half_e8m0(uint32_t e) {
  const uint32_t bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The elements of row `r` of an array of scales.
template <typename T>
const T* row_of(const unsigned char* tile, const PlaneArray& array, int r) {
  return reinterpret_cast<const T*>(tile + array.at + r * (SUPER_BLOCK / array.weights) * array.bytes);
}

// Scales, or minimums, of the row's groups from the array at `index`, and their steps, in fp32 without rounding.
inline void read_scales(const unsigned char* tile, int r, const WeightType& type, int64_t index,
                        float (&s)[MOST_GROUPS]) {
  const PlaneArray& array = type.arrays[index];
  const int64_t groups = SUPER_BLOCK / type.group;
  const auto fill = [&](const auto* elements, auto value_of) {
    for (int64_t j = 0; j < groups; ++j) s[j] = value_of(elements[j]);
  };
  const std::string_view dtype = array.dtype;
  if (dtype == "BF16") return fill(row_of<Bf16>(tile, array, r), [](Bf16 each) { return static_cast<float>(each); });
  if (dtype == "F16") return fill(row_of<Fp16>(tile, array, r), [](Fp16 each) { return static_cast<float>(each); });
  const unsigned char* const bytes = row_of<unsigned char>(tile, array, r);
  if (type.scales == SCALES_E8M0) return fill(bytes, half_e8m0);
  const float step = static_cast<float>(*row_of<Fp16>(tile, type.arrays[index + 1 + type.minimum], r));
  const int offset = dtype == "I8" ? 128 : 0;
  fill(bytes, [=](int each) { return static_cast<float>(each - offset) * step; });
}

// One row of a super-block: weight = scale * code - minimum.
struct RowParts {
  signed char q[SUPER_BLOCK];
  float scale[MOST_GROUPS], minimum[MOST_GROUPS];  // a minimum only if the type has them

  RowParts(const unsigned char* tile, int r, const WeightType& type) {
    read_codes(tile, r, type, q);
    read_scales(tile, r, type, type.planes, scale);
    if (type.minimum) read_scales(tile, r, type, type.planes + 1, minimum);
  }
};

// The weights of row `r`, rounded once to `T`.
template <typename T>
void read_weights(const unsigned char* tile, int r, const WeightType& type, T* weights) {
  const RowParts row(tile, r, type);
  for (int64_t i = 0; i < SUPER_BLOCK; ++i) {
    const float product = static_cast<float>(row.q[i]) * row.scale[i / type.group];
    weights[i] = static_cast<T>(type.minimum ? product - row.minimum[i / type.group] : product);
  }
}

}  // namespace q6k

#include <algorithm>
#include <type_traits>

#include "cpu.h"
#include "parallel.h"
#include "tiles.h"

namespace q6k {
namespace {

// Calls `use` with a null pointer of the type of that dtype.
template <typename Use>
void with_type(int32_t dtype, Use use) {
  switch (float_kind(dtype)) {
    case 0:
      return use(static_cast<Bf16*>(nullptr));
    case 1:
      return use(static_cast<Fp16*>(nullptr));
    default:
      return use(static_cast<float*>(nullptr));
  }
}

// Writes row `row` of a weight to `out`, k values of `dtype`, at index `at`.
void write_row(const Tensor& tiles, int64_t row, void* out, int64_t at, int64_t k, const WeightType& type,
               int32_t dtype) {
  const int64_t blocks = ceil_div(k, SUPER_BLOCK);
  const unsigned char* tile =
      static_cast<const unsigned char*>(tiles.data()) + row / TILE_ROWS * blocks * type.tile_bytes;
  with_type(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    T* const to = static_cast<T*>(out) + at * k;
    for (int64_t block = 0; block < blocks; ++block) {
      T weights[SUPER_BLOCK];
      read_weights(tile + block * type.tile_bytes, static_cast<int>(row % TILE_ROWS), type, weights);
      const int64_t begin = block * SUPER_BLOCK;
      std::copy_n(weights, std::min<int64_t>(SUPER_BLOCK, k - begin), to + begin);
    }
  });
}

int64_t index_at(const Tensor& indices, const void* data, int64_t at) {
  return indices.dtype() == dtypes().int32 ? static_cast<const int32_t*>(data)[at]
                                           : static_cast<const int64_t*>(data)[at];
}

// The stored codes of `count` weights of a row, from a super-block's part of its planes.
void read_planes(const unsigned char* first, const unsigned char* high, int count, const WeightType& type,
                 unsigned char (&codes)[SUPER_BLOCK]) {
  for (int i = 0; i < count; ++i) {
    if (type.bits == 8) {
      codes[i] = first[i];
      continue;
    }
    int code = first[i / 2] >> (4 * (i & 1)) & 15;
    // Chunks of 32 weights: byte w the even ones of 8w..8w+7, byte 4 + w the odd ones, two bits each.
    if (type.bits == 6) code |= (high[i / 32 * 8 + i % 32 / 8 + 4 * (i & 1)] >> (i % 8 / 2 * 2) & 3) << 4;
    // Bytes of eight weights: the even ones, then the odd ones.
    if (type.bits == 5) code |= (high[i / 8] >> (i % 8 / 2 + 4 * (i & 1)) & 1) << 4;
    codes[i] = static_cast<unsigned char>(code);
  }
}

void write_codes(const unsigned char (&codes)[SUPER_BLOCK], int count, int r, const WeightType& type,
                 unsigned char* tile) {
  for_weights(r, type, [&](int i, const Place& place) {
    if (i >= count) return;
    for (const Bits& bits : {place.first, place.other}) {
      const int part = codes[i] >> bits.to & ((1 << bits.count) - 1);
      tile[bits.byte] = static_cast<unsigned char>(tile[bits.byte] | part << bits.from);
    }
  });
}

}  // namespace

Tensor embedding_cpu(const Tensor& indices, const Tensor& tiles, int64_t n, int64_t k, const WeightType& type,
                     int32_t dtype) {
  const Tensor flat = contiguous(indices);
  const int64_t count = flat.numel();
  const void* const data = flat.data();
  for (int64_t at = 0; at < count; ++at) {
    const int64_t row = index_at(flat, data, at);
    if (row < 0 || row >= n) {
      throw std::out_of_range("indices: expected 0 to " + std::to_string(n - 1) + ", found " + std::to_string(row) +
                              " at position " + std::to_string(at) + " of " + std::to_string(count));
    }
  }
  std::vector<int64_t> shape = indices.shape();
  shape.push_back(k);
  Tensor result = empty(shape, dtype, tiles);
  void* const out = result.data();
  parallel_for(count, [&](int64_t at) { write_row(tiles, index_at(flat, data, at), out, at, k, type, dtype); });
  return result;
}

Tensor dequantize_cpu(const Tensor& tiles, int64_t n, int64_t k, const WeightType& type, int32_t dtype) {
  Tensor result = empty({n, k}, dtype, tiles);
  void* const out = result.data();
  parallel_for(n, [&](int64_t row) { write_row(tiles, row, out, row, k, type, dtype); });
  return result;
}

Tensor pack_cpu(const std::vector<Tensor>& planes, const WeightType& type, const std::vector<int64_t>& tiles_shape) {
  Tensor tiles = empty(tiles_shape, dtypes().uint8, planes.front());
  std::vector<Tensor> whole;
  for (const Tensor& plane : planes) whole.push_back(contiguous(plane));
  const int64_t n = planes.front().size(-2), k = planes.front().size(-1) * type.arrays[0].weights;
  const int64_t blocks = tiles.size(-2), size = tiles.size(-1), row_tiles = tiles.size(-3);
  unsigned char* const out = static_cast<unsigned char*>(tiles.data());
  // A row's part of an array that belongs to a super-block.
  const auto part = [&](int64_t array, int64_t row, int64_t block) {
    const PlaneArray& each = type.arrays[array];
    const int64_t at = row * (k / each.weights) + block * (SUPER_BLOCK / each.weights);
    return static_cast<const unsigned char*>(whole[static_cast<size_t>(array)].data()) + at * each.bytes;
  };
  const int64_t code_planes = type.count - type.scale_count;
  parallel_for(tiles.numel() / (blocks * size), [&](int64_t row_tile) {
    const int64_t matrix = row_tile / row_tiles, first = row_tile % row_tiles * TILE_ROWS;
    for (int64_t block = 0; block < blocks; ++block) {
      unsigned char* const tile = out + (row_tile * blocks + block) * size;
      std::memset(tile, 0, static_cast<size_t>(size));
      const int64_t count = std::min<int64_t>(SUPER_BLOCK, k - block * SUPER_BLOCK);
      for (int64_t r = 0; r < TILE_ROWS && first + r < n; ++r) {
        const int64_t row = matrix * n + first + r;
        unsigned char codes[SUPER_BLOCK] = {};
        read_planes(part(0, row, block), code_planes > 1 ? part(1, row, block) : nullptr, static_cast<int>(count), type,
                    codes);
        write_codes(codes, static_cast<int>(count), static_cast<int>(r), type, tile);
        for (int64_t array = code_planes; array < type.count; ++array) {
          const PlaneArray& each = type.arrays[array];
          const int64_t width = SUPER_BLOCK / each.weights * each.bytes, bytes = count / each.weights * each.bytes;
          unsigned char* const to = tile + each.at + r * width;
          std::memcpy(to, part(array, row, block), static_cast<size_t>(bytes));
          if (type.scales == SCALES_INT8_STEPS && each.bytes == 1) {
            for (int64_t i = 0; i < bytes; ++i) to[i] ^= 0x80;
          }
        }
      }
    }
  });
  return tiles;
}

}  // namespace q6k

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
  const unsigned char* tile =
      static_cast<const unsigned char*>(tiles.data()) + row / TILE_ROWS * super_blocks(k) * type.tile_bytes;
  with_type(dtype, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    T* const to = static_cast<T*>(out) + at * k;
    T weights[SUPER_BLOCK];  // the last tile may be wider than the row
    for (int64_t first = 0; first < k; first += SUPER_BLOCK, tile += type.tile_bytes) {
      read_weights(tile, static_cast<int>(row % TILE_ROWS), type, weights);
      std::copy_n(weights, std::min(SUPER_BLOCK, k - first), to + first);
    }
  });
}

int64_t index_at(const Tensor& indices, const void* data, int64_t at) {
  return indices.dtype() == dtypes().int32 ? static_cast<const int32_t*>(data)[at]
                                           : static_cast<const int64_t*>(data)[at];
}

// Copies what exists of a row of an array of scales; int8 is kept plus 128.
void write_scales(const PlaneArray& array, const unsigned char* from, int64_t count, int r, unsigned char* tile) {
  unsigned char* const to = tile + array.at + r * (SUPER_BLOCK / array.weights) * array.bytes;
  const bool turned = std::string_view(array.dtype) == "I8";
  for (int64_t i = 0; i < count * array.bytes; ++i) to[i] = turned ? from[i] ^ 0x80 : from[i];
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
  const int64_t n = planes.front().size(-2), blocks = tiles.size(-2), size = tiles.size(-1), row_tiles = tiles.size(-3);
  unsigned char* const out = static_cast<unsigned char*>(tiles.data());
  std::vector<const unsigned char*> from;
  for (const Tensor& plane : whole) from.push_back(static_cast<const unsigned char*>(plane.data()));
  const int64_t k = planes.front().size(-1) * type.arrays[0].weights;
  parallel_for(tiles.numel() / (blocks * size), [&](int64_t row_tile) {
    const int64_t matrix = row_tile / row_tiles, first = row_tile % row_tiles * TILE_ROWS;
    for (int64_t block = 0; block < blocks; ++block) {
      unsigned char* const tile = out + (row_tile * blocks + block) * size;
      std::memset(tile, 0, static_cast<size_t>(size));
      const int64_t column = block * SUPER_BLOCK, present = std::min(SUPER_BLOCK, k - column);
      for (int64_t row = 0; row < TILE_ROWS && first + row < n; ++row) {
        // The part of an array that holds the row of the super-block.
        const auto part = [&](int64_t i) {
          const PlaneArray& array = type.arrays[i];
          const int64_t at = (matrix * n + first + row) * (k / array.weights) + column / array.weights;
          return from[static_cast<size_t>(i)] + at * array.bytes;
        };
        const int r = static_cast<int>(row);
        const unsigned char *const low = part(0), *const high = type.planes > 1 ? part(1) : nullptr;
        with_codes(type, [&](auto codes) {
          unsigned char stored[SUPER_BLOCK] = {};
          for (int i = 0; i < present; ++i) stored[i] = static_cast<unsigned char>(codes.of_planes(low, high, i));
          codes.write(stored, r, tile);
        });
        for (int64_t i = type.planes; i < type.count; ++i) {
          write_scales(type.arrays[i], part(i), present / std::min(present, type.arrays[i].weights), r, tile);
        }
      }
    }
  });
  return tiles;
}

}  // namespace q6k

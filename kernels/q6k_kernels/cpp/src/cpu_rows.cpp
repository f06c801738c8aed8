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
      static_cast<const unsigned char*>(tiles.data()) + row / TILE_ROWS * (k / SUPER_BLOCK) * type.tile_bytes;
  with_type(dtype, [&](auto* kind) {
    auto* to = static_cast<decltype(kind)>(out) + at * k;
    for (int64_t block = 0; block < k / SUPER_BLOCK; ++block) {
      read_weights(tile + block * type.tile_bytes, static_cast<int>(row % TILE_ROWS), type,
                   to + block * SUPER_BLOCK);
    }
  });
}

int64_t index_at(const Tensor& indices, const void* data, int64_t at) {
  return indices.dtype() == dtypes().int32 ? static_cast<const int32_t*>(data)[at]
                                           : static_cast<const int64_t*>(data)[at];
}

// The part of the planes that holds one row of a super-block.
struct PlaneRow {
  const unsigned char *ql, *qh, *scale, *step;  // 128, 64, 16 or 32, and 2 bytes; a step only if scales are stepped
};

void write_codes(const PlaneRow& from, int r, unsigned char* tile) {
  unsigned char v[SUPER_BLOCK];  // six bits, two's complement
  for (int i = 0; i < SUPER_BLOCK; ++i) {
    const int low = from.ql[i / 2] >> (4 * (i & 1)) & 15;
    // Chunks of 32 weights: byte w the even ones of 8w..8w+7, byte 4 + w the odd ones, two bits each.
    const int within = i % 32, byte = within / 8 + 4 * (within & 1);
    const int high = from.qh[i / 32 * 8 + byte] >> (within % 8 / 2 * 2) & 3;
    v[i] = static_cast<unsigned char>((low | high << 4) ^ 32);
  }
  for_elements(r, [&](int element, Place place) {
    for (int group = 0; group < GROUPS; ++group) {
      const int code = v[group * GROUP + element];
      tile[place.high(group / 2)] |= static_cast<unsigned char>(code >> 2 << (4 * (group & 1)));
      tile[place.low(group / 4)] |= static_cast<unsigned char>((code & 3) << (2 * (group & 3)));
    }
  });
}

void write_scales(const PlaneRow& from, int r, unsigned char* tile) {
  if (!from.step) {
    std::memcpy(tile + SCALES_AT + 32 * r, from.scale, 32);
    return;
  }
  for (int j = 0; j < GROUPS; ++j) tile[SCALES_AT + 16 * r + j] = from.scale[j] ^ 0x80;
  std::memcpy(tile + STEPS_AT + 2 * r, from.step, 2);
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
  const auto bytes = [&](size_t i) { return static_cast<const unsigned char*>(whole[i].data()); };
  const bool stepped = type.scales == SCALES_STEPPED;
  const int64_t scale_bytes = stepped ? GROUPS : 2 * GROUPS;
  const PlaneRow all = {bytes(0), bytes(1), bytes(2), stepped ? bytes(3) : nullptr};
  parallel_for(tiles.numel() / (blocks * size), [&](int64_t row_tile) {
    const int64_t matrix = row_tile / row_tiles, first = row_tile % row_tiles * TILE_ROWS;
    for (int64_t block = 0; block < blocks; ++block) {
      unsigned char* const tile = out + (row_tile * blocks + block) * size;
      std::memset(tile, 0, static_cast<size_t>(size));
      for (int64_t r = 0; r < TILE_ROWS && first + r < n; ++r) {
        const int64_t at = (matrix * n + first + r) * blocks + block;
        const PlaneRow row = {all.ql + at * 128, all.qh + at * 64, all.scale + at * scale_bytes,
                              all.step ? all.step + at * 2 : nullptr};
        write_codes(row, static_cast<int>(r), tile);
        write_scales(row, static_cast<int>(r), tile);
      }
    }
  });
  return tiles;
}

}  // namespace q6k

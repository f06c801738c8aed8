// The plan of a product: cuda/decode_plan.py, gemm_wgmma.py and gemm_mma.py in C++, from the same tables (tables.h).
//
// Plans depend only on sizes and the GPU. Tests compare them with Python's on a grid of sizes.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

#include "tables.h"

namespace q6k {

// The row of that name. Throws std::invalid_argument if there is none.
const WeightType& weight_type(std::string_view name);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The limits of a GPU; `cuda.device.Device` describes each.
struct Device {
  int index;
  int64_t arch, multiprocessors, shared_bytes, multiprocessor_shared_bytes;
};

// `decode_plan.DecodePlan`.
struct DecodePlan {
  int64_t tokens, fused, warps, stages, occupancy, cluster, ranges, early, shared_bytes;
};

// Bytes of quantised activations of a super-block, of their scales, and of their parts for minimums.
struct ActivationBytes {
  int64_t codes, steps, parts;
};
ActivationBytes activation_bytes(int64_t tokens, bool fused);

// For 1 to 8 rows of activations; none if they do not fit in shared memory.
std::optional<DecodePlan> plan_decode(int64_t m, int64_t n, int64_t k, const WeightType& type, const Device& device);

// `gemm_wgmma.Config`, a row of WGMMA_CONFIGS.
struct WgmmaConfig {
  int64_t tokens, consumers, tile_stages, x_stages, occupancy, cycles, index;

  int64_t stages(const WeightType& type) const { return WGMMA_STAGES[index][type.index]; }
  int64_t rows() const { return 64 * consumers; }
  int64_t threads() const { return consumers * 128 + (tokens > 128 ? 128 : 64); }
  int64_t shared_bytes(const WeightType& type) const {
    const int64_t rings = x_stages * tokens * 128 + stages(type) * rows() / TILE_ROWS * type.tile_bytes;
    return rings + consumers * 4 * 512 + (x_stages + stages(type)) * 16;
  }
};

// `gemm_wgmma.WgmmaPlan`.
struct WgmmaPlan {
  WgmmaConfig config;
  int64_t token_blocks, row_blocks, blocks, whole;

  int64_t shared() const { return token_blocks * row_blocks - whole; }
  int64_t scratch_floats() const { return shared() ? blocks * config.rows() * config.tokens : 0; }
  int64_t scratch_flags() const { return shared() ? blocks * config.consumers * 4 : 0; }
};
WgmmaPlan plan_wgmma(int64_t m, int64_t n, int64_t k, const Device& device);

// `gemm_mma.MmaPlan`.
struct MmaPlan {
  int64_t tokens, parts, splits, slots, blocks, shared_bytes;

  int64_t steps(int64_t k) const { return ceil_div(ceil_div(ceil_div(k, SUPER_BLOCK), splits), parts); }
};
MmaPlan plan_mma(int64_t m, int64_t n, int64_t k, const WeightType& type, const Device& device);

// Rows of a weight that are expanded at a time for cuBLAS: `cuda.expand.slice_rows`.
inline int64_t slice_rows(int64_t m, int64_t k) {
  const int64_t rows = EXPAND_BYTES / (2 * k + 4 * m) / TILE_ROWS * TILE_ROWS;
  return rows > TILE_ROWS ? rows : TILE_ROWS;
}

}  // namespace q6k

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

// Super-blocks of a row of k weights; the last may be wider than the row.
inline int64_t super_blocks(int64_t k) { return ceil_div(k, SUPER_BLOCK); }

// The limits of a GPU; `cuda.device.Device` describes each.
struct Device {
  int index;
  int64_t arch, multiprocessors, shared_bytes, multiprocessor_shared_bytes;
};

// `decode_plan.DecodePlan`.
struct DecodePlan {
  int64_t tokens, fused, warps, stages, occupancy, cluster, ranges, early, shared_bytes;
};

// `decode_plan.activation_bytes`: of a super-block's quantised activations, of their scales, and of their parts for
// minimums. The sums take as many as the scales.
struct ActivationBytes {
  int64_t codes, steps, parts;
};
ActivationBytes activation_bytes(int64_t tokens, bool fused);

// For 1 to 8 rows of activations; none if they do not fit in shared memory.
std::optional<DecodePlan> plan_decode(int64_t m, int64_t n, int64_t k, const WeightType& type, const Device& device);

// `gemm_wgmma.WgmmaPlan`.
struct WgmmaPlan {
  const WgmmaConfig* config;  // of WGMMA_CONFIGS
  int64_t token_blocks, row_blocks, blocks, whole;

  int64_t shared() const { return token_blocks * row_blocks - whole; }
  int64_t scratch_floats() const { return shared() ? blocks * config->rows * config->tokens : 0; }
  int64_t scratch_flags() const { return shared() ? blocks * config->consumers * 4 : 0; }
};
WgmmaPlan plan_wgmma(int64_t m, int64_t n, int64_t k, const Device& device);

// `gemm_mma.MmaPlan`.
struct MmaPlan {
  int64_t tokens, parts, splits, slots, blocks, shared_bytes;

  int64_t steps(int64_t k) const { return ceil_div(ceil_div(super_blocks(k), splits), parts); }
};
MmaPlan plan_mma(int64_t m, int64_t n, int64_t k, const WeightType& type, const Device& device);

// Rows of a weight that are expanded at a time for cuBLAS: `cuda.expand.slice_rows`.
inline int64_t slice_rows(int64_t m, int64_t k) {
  const int64_t rows = EXPAND_BYTES / (2 * k + 4 * m) / TILE_ROWS * TILE_ROWS;
  return rows > TILE_ROWS ? rows : TILE_ROWS;
}

}  // namespace q6k

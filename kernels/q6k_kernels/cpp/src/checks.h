// What every operation demands of its arguments: the rules and texts of ops.py, prepack.py and reference.py.
//
// std::invalid_argument becomes Python's ValueError, std::out_of_range its IndexError.
#pragma once
#include "plans.h"
#include "tensors.h"

namespace q6k {

enum class Activations { AUTO, INT8, BF16 };

inline bool is_exact(const Tensor& tiles) { return tiles.size(-1) == TILE_BYTES_EXACT; }

// K of the weight. `halves`: whether x has to be 16-bit, as on a GPU.
int64_t check_linear(const Tensor& x, const Tensor& tiles, const std::optional<Tensor>& bias, int64_t n,
                     const std::string& activations, bool halves);
int64_t check_embedding(const Tensor& indices, const Tensor& tiles, int64_t n, int32_t dtype);
int64_t check_dequantize(const Tensor& tiles, int64_t n, int32_t dtype);
// The shape of the tiles.
std::vector<int64_t> check_pack(const Tensor& ql, const Tensor& qh, const Tensor& scale,
                                const std::optional<Tensor>& steps);
// Of a name that `check_linear` has accepted.
Activations activations_of(const std::string& name);
// Kernels copy tiles 16 bytes at a time.
void check_aligned(const Tensor& tiles);

}  // namespace q6k

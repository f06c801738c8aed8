// Checks of the operations' arguments: the rules and messages of ops/schema.py, formats/checks.py and formats/tiles.py.
//
// std::invalid_argument becomes Python's ValueError, std::out_of_range its IndexError.
#pragma once
#include "plans.h"
#include "tensors.h"

namespace q6k {

enum class Activations { AUTO, INT8, BF16 };

// Returns the weight type. `halves`: whether x has to be 16-bit, as on a GPU.
const WeightType& check_linear(const Tensor& x, const Tensor& tiles, const std::optional<Tensor>& bias, int64_t n,
                               const std::string& format, const std::string& activations, bool halves);
void check_embedding(const Tensor& indices, const Tensor& tiles, int64_t n, int64_t k, const WeightType& type,
                     int32_t dtype);
void check_dequantize(const Tensor& tiles, int64_t n, int64_t k, const WeightType& type, int32_t dtype);
// Returns the shape of the tiles.
std::vector<int64_t> check_pack(const std::vector<Tensor>& planes, const WeightType& type);
// The mode with a name that `check_linear` has accepted.
Activations activations_of(const std::string& name);
// Kernels copy tiles 16 bytes at a time.
void check_aligned(const Tensor& tiles);

}  // namespace q6k

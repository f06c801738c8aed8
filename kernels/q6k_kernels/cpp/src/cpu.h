// The operations on the CPU: the formulas of ops/reference.py on tiles, in plain C++ and on torch's threads.
#pragma once
#include "checks.h"

namespace q6k {

// Arguments must have passed `check_*`; results are new tensors.
Tensor linear_cpu(const Tensor& x, const Tensor& tiles, const std::optional<Tensor>& bias, int64_t n, int64_t k,
                  const WeightType& type, Activations activations);
Tensor embedding_cpu(const Tensor& indices, const Tensor& tiles, int64_t n, int64_t k, const WeightType& type,
                     int32_t dtype);
Tensor dequantize_cpu(const Tensor& tiles, int64_t n, int64_t k, const WeightType& type, int32_t dtype);
Tensor pack_cpu(const std::vector<Tensor>& planes, const WeightType& type, const std::vector<int64_t>& tiles_shape);

}  // namespace q6k

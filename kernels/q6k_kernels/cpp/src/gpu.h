// The operations on CUDA GPUs, with the choice of kernels of cuda/dispatch.py.
#pragma once
#include "checks.h"

namespace q6k {

// Arguments must have passed `check_*`; results are new tensors. All work goes to the current stream of the tensors'
// GPU, nothing waits for it, and it can be captured in a CUDA graph.
Tensor linear_cuda(const Tensor& x, const Tensor& tiles, const std::optional<Tensor>& bias, int64_t n, int64_t k,
                   const WeightType& type, Activations activations);
Tensor embedding_cuda(const Tensor& indices, const Tensor& tiles, int64_t n, int64_t k, const WeightType& type,
                      int32_t dtype);
Tensor dequantize_cuda(const Tensor& tiles, int64_t n, int64_t k, const WeightType& type, int32_t dtype);
Tensor pack_cuda(const std::vector<Tensor>& planes, const WeightType& type, const std::vector<int64_t>& tiles_shape);

// The kernel for 16-bit activations: as planned, or for tests one that only other GPUs would use.
enum class Gemm { PLANNED, MMA, EXPAND };
void force_gemm(Gemm which);

}  // namespace q6k

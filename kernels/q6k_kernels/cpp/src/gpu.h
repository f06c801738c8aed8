// The operations on CUDA GPUs: which kernel does what, as cuda.py has it.
#pragma once
#include "checks.h"

namespace q6k {

// Arguments as `check_*` accept them; results are new. All work goes to the current stream of the tensors' GPU, nothing
// waits for it, and all of it can be captured in a CUDA graph.
Tensor linear_cuda(const Tensor& x, const Tensor& tiles, const std::optional<Tensor>& bias, int64_t n, int64_t k,
                   const WeightType& type, Activations activations);
Tensor embedding_cuda(const Tensor& indices, const Tensor& tiles, int64_t n, int64_t k, const WeightType& type,
                      int32_t dtype);
Tensor dequantize_cuda(const Tensor& tiles, int64_t n, int64_t k, const WeightType& type, int32_t dtype);
Tensor pack_cuda(const std::vector<Tensor>& planes, const WeightType& type, const std::vector<int64_t>& tiles_shape);

// What multiplies 16-bit activations: as plans say, or for tests what only other GPUs would take.
enum class Gemm { PLANNED, MMA, EXPAND };
void force_gemm(Gemm which);

}  // namespace q6k

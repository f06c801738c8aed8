// The launches of each operation, from pointers and sizes, as in cuda/decode.py, cuda/gemm_wgmma.py, cuda/gemm_mma.py
// and cuda/rows.py. Arguments have been checked.
#pragma once
#include "kernels.h"

namespace q6k {

// GPU memory with the lifetime of the object, ordered by the current stream.
class Scratch {
 public:
  virtual ~Scratch() = default;
  virtual void* take(int64_t bytes) = 0;
};

// y[m, n] = x[m, k] W^T (+ bias).
struct Product {
  const void* x;    // 16-bit; rows `stride` elements apart and aligned to 16 bytes
  const void* tiles;
  const void* bias; // (n,) of `bias_kind`, or null
  void* y;          // x's type, rows n elements apart
  int64_t m, n, k, stride, row_tiles;
  int bias_kind;    // BiasKind in common.cuh
  const WeightType* type;
  bool fp16;
  const Device* device;
  CUstream stream;
};

// In launches of up to 8 rows. Throws std::invalid_argument if not even one row fits.
void launch_decode(const Product& product, Scratch& scratch);
// For Hopper.
void launch_wgmma(const Product& product, Scratch& scratch);
// For GPUs other than Hopper.
void launch_mma(const Product& product, Scratch& scratch);

// For tests: the number that marks the next launch's words in memory shared by blocks.
void set_ticket(uint64_t next);

// The planes of a weight type, aligned, each at its array's `place`; null where the type has none.
struct Planes {
  const void* at[MOST_PLANES];
};
static_assert(MOST_PLANES == 6, "launch_pack hands over six");
void launch_pack(const Planes& planes, const WeightType& type, void* tiles, int64_t n, int64_t k, int64_t count,
                 const Device& device, CUstream stream);
// `out_kind` 0 bf16, 1 fp16, 2 fp32: the place in `reference.FLOATS`.
void launch_gather(const void* tiles, const void* indices, bool int32, void* out, int out_kind, int64_t count,
                   int64_t n, int64_t k, const WeightType& type, const Device& device, CUstream stream);
void launch_dequantize(const void* tiles, void* out, int out_kind, int64_t first_row, int64_t rows, int64_t k,
                       const WeightType& type, const Device& device, CUstream stream);

}  // namespace q6k

#include "gpu.h"

#include <algorithm>
#include <list>

#include "launches.h"

// Weak, as only a torch with CUDA has it: so the library also loads in a torch without.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace q6k {
namespace {

std::atomic<Gemm> forced{Gemm::PLANNED};

CUstream stream_of(const Tensor& tensor) {
  if (!aoti_torch_get_current_cuda_stream) {
    throw std::runtime_error("this torch is built without CUDA. Install torch for CUDA: `pip install torch`.");
  }
  void* stream;
  Q6K_TORCH(aoti_torch_get_current_cuda_stream(tensor.device_index(), &stream));
  return static_cast<CUstream>(stream);
}

// Memory from torch's allocator, freed at the end: the launches are in the stream by then, before any later user.
class TorchScratch final : public Scratch {
 public:
  explicit TorchScratch(const Tensor& like) : like_(like) {}
  void* take(int64_t bytes) override {
    taken_.push_back(empty({bytes}, dtypes().uint8, like_));
    return taken_.back().data();
  }

 private:
  const Tensor& like_;
  std::list<Tensor> taken_;
};

// x as contiguous rows, 16-byte aligned, with any stride: its own memory if it has that form, else a copy.
struct Rows {
  std::optional<Tensor> copied;
  const void* data;
  int64_t count, stride;
};

Rows rows_of(const Tensor& x, int64_t k) {
  Rows rows = {std::nullopt, x.data(), x.numel() / k, k};
  // One stride for all rows, if the leading dimensions allow it.
  bool even = x.stride(-1) == 1;
  int64_t next = -1;  // the stride that the next outer dimension has to have
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (next < 0) {
      rows.stride = x.stride(i);
    } else if (x.stride(i) != next) {
      even = false;
    }
    next = x.stride(i) * x.size(i);
  }
  if (even && rows.stride % 8 == 0 && rows.stride >= k && x.is_aligned(ALIGNMENT)) return rows;
  rows.copied = contiguous(x, ALIGNMENT);
  rows.data = rows.copied->data();
  rows.stride = k;
  return rows;
}

// Many rows on GPUs other than Hopper: expands a slice of the weight, multiplies it by cuBLAS, then does the next one.
// See cuda/expand.py.
void expand_and_multiply(const Product& product, const Tensor& rows, const Tensor& tiles,
                         const std::optional<Tensor>& bias, const Tensor& y) {
  const int64_t m = product.m, n = product.n, k = product.k, step = std::min(slice_rows(m, k), n);
  const Tensor x = view(rows, {m, k}, {product.stride, 1}, 0);
  const Tensor weights = empty({step, k}, rows.dtype(), rows);
  for (int64_t first = 0; first < n; first += step) {
    const int64_t count = std::min(step, n - first);
    launch_dequantize(tiles.data(), weights.data(), float_kind(weights.dtype()), first, count, k, *product.type,
                      *product.device, product.stream);
    Tensor sums = multiply_fp32(x, view(weights, {k, count}, {1, k}, 0));
    if (bias) sums = add(sums, view(*bias, {count}, {1}, first));
    copy(view(y, {m, count}, {n, 1}, first), sums);
  }
}

}  // namespace

void force_gemm(Gemm which) { forced = which; }

Tensor linear_cuda(const Tensor& x, const Tensor& tiles, const std::optional<Tensor>& bias, int64_t n, int64_t k,
                   const WeightType& type, Activations activations) {
  check_aligned(tiles);
  const Device& device = device_of(x.device_index());
  std::vector<int64_t> shape = x.shape();
  shape.back() = n;
  Tensor y = empty(shape, x.dtype(), x);
  if (y.numel() == 0) return y;
  const Rows rows = rows_of(x, k);
  std::optional<Tensor> values;
  if (bias && bias->stride(0) != 1) values = contiguous(*bias);
  const std::optional<Tensor>& addend = values ? values : bias;
  Product product = {};
  product.x = rows.data, product.stride = rows.stride, product.m = rows.count;
  product.tiles = tiles.data(), product.row_tiles = tiles.size(0), product.type = &type;
  product.y = y.data(), product.n = n, product.k = k, product.fp16 = x.dtype() == dtypes().fp16;
  if (addend) product.bias = addend->data(), product.bias_kind = 1 + float_kind(addend->dtype());
  product.device = &device, product.stream = stream_of(x);
  TorchScratch scratch(x);
  if (activations == Activations::AUTO && product.m <= DECODE_M && plan_decode(1, n, k, type, device)) {
    activations = Activations::INT8;
  }
  const Gemm gemm = forced.load(std::memory_order_relaxed);
  if (activations == Activations::INT8) {
    launch_decode(product, scratch);
  } else if (device.arch == WGMMA_ARCH && gemm == Gemm::PLANNED) {
    launch_wgmma(product, scratch);
  } else if (gemm == Gemm::MMA || (gemm == Gemm::PLANNED && product.m < PREFILL_M)) {
    launch_mma(product, scratch);
  } else {
    expand_and_multiply(product, rows.copied ? *rows.copied : x, tiles, addend, y);
  }
  return y;
}

Tensor embedding_cuda(const Tensor& indices, const Tensor& tiles, int64_t n, int64_t k, const WeightType& type,
                      int32_t dtype) {
  check_aligned(tiles);
  std::vector<int64_t> shape = indices.shape();
  shape.push_back(k);
  Tensor out = empty(shape, dtype, tiles);
  if (indices.numel() == 0) return out;
  const Tensor rows = contiguous(indices);
  launch_gather(tiles.data(), rows.data(), rows.dtype() == dtypes().int32, out.data(), float_kind(dtype),
                rows.numel(), n, k, type, device_of(tiles.device_index()), stream_of(tiles));
  return out;
}

Tensor dequantize_cuda(const Tensor& tiles, int64_t n, int64_t k, const WeightType& type, int32_t dtype) {
  check_aligned(tiles);
  Tensor out = empty({n, k}, dtype, tiles);
  launch_dequantize(tiles.data(), out.data(), float_kind(dtype), 0, n, k, type,
                    device_of(tiles.device_index()), stream_of(tiles));
  return out;
}

Tensor pack_cuda(const std::vector<Tensor>& planes, const WeightType& type, const std::vector<int64_t>& tiles_shape) {
  const Tensor& codes = planes.front();
  const Device& device = device_of(codes.device_index());
  Tensor tiles = empty(tiles_shape, dtypes().uint8, codes);
  std::list<Tensor> own;
  Planes given = {};
  for (size_t i = 0; i < planes.size(); ++i) {
    own.push_back(contiguous(planes[i], ALIGNMENT));
    given.at[type.arrays[i].place] = own.back().data();
  }
  launch_pack(given, type, tiles.data(), codes.size(-2), codes.size(-1) * type.arrays[0].weights,
              tiles.numel() / tiles.size(-1), device, stream_of(codes));
  // Kernels of products begin to copy tiles while the launch before them ends. A memset, which overlaps with
  // nothing, separates them from the launch that wrote the tiles (`cuda.device.end_write`).
  const Tensor between = empty({1}, dtypes().uint8, tiles);
  Q6K_TORCH(aoti_torch_zero_(between.handle()));
  return tiles;
}

}  // namespace q6k

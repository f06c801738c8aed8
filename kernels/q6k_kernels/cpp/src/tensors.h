// Tensors through torch's stable C interface: their properties, new tensors, and a few operations of torch.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace q6k {

// Throws unless a function of torch succeeded; torch itself prints why.
#define Q6K_TORCH(call) \
  if ((call) != 0) throw std::runtime_error("torch refused " #call)

// torch's numbers for dtypes.
struct Dtypes {
  int32_t bf16 = aoti_torch_dtype_bfloat16(), fp16 = aoti_torch_dtype_float16(), fp32 = aoti_torch_dtype_float32();
  int32_t uint8 = aoti_torch_dtype_uint8(), int8 = aoti_torch_dtype_int8();
  int32_t int32 = aoti_torch_dtype_int32(), int64 = aoti_torch_dtype_int64();
};
inline const Dtypes& dtypes() {
  static const Dtypes all;
  return all;
}

// The name of a dtype without torch's prefix: "bfloat16".
std::string dtype_name(int32_t dtype);
// The dtype bfloat16, float16 or float32 with a name.
int32_t dtype_named(const std::string& name);
// The index of a dtype in `reference.FLOATS` (bf16, fp16, fp32); -1 for others.
inline int float_kind(int32_t dtype) {
  const Dtypes& all = dtypes();
  return dtype == all.bf16 ? 0 : dtype == all.fp16 ? 1 : dtype == all.fp32 ? 2 : -1;
}

// An owned tensor with its properties, which are read once.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle owned);
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept;
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  AtenTensorHandle handle() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i < 0 ? dim_ + i : i]; }
  int64_t stride(int64_t i) const { return strides_[i < 0 ? dim_ + i : i]; }
  int64_t numel() const;
  int32_t dtype() const { return dtype_; }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }
  bool is_cuda() const { return device_type_ == aoti_torch_device_type_cuda(); }
  bool is_contiguous() const;
  bool on_device_of(const Tensor& other) const {
    return device_type_ == other.device_type_ && device_index_ == other.device_index_;
  }
  void* data() const;
  bool is_aligned(int64_t to) const { return reinterpret_cast<uintptr_t>(data()) % static_cast<uintptr_t>(to) == 0; }
  std::vector<int64_t> shape() const { return {sizes_, sizes_ + dim_}; }

 private:
  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;  // the tensor's own
  int32_t dtype_ = 0, device_type_ = 0, device_index_ = 0;
};

// A shape in Python's notation: "(2, 256)", "(3,)".
std::string shape_text(const std::vector<int64_t>& shape);
// A device in torch's notation: "cuda:0".
std::string device_text(const Tensor& tensor);

// A new contiguous tensor on `like`'s device, uninitialised.
Tensor empty(const std::vector<int64_t>& shape, int32_t dtype, const Tensor& like);
// The tensor itself if it is contiguous and aligned, else a contiguous copy; `alignment` in bytes, 0 for any.
Tensor contiguous(const Tensor& tensor, int64_t alignment = 0);
// A view of its memory that begins `offset` elements after the tensor's start.
Tensor view(const Tensor& tensor, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
            int64_t offset);
// The matrix product a b in fp32 of 16-bit matrices.
Tensor multiply_fp32(const Tensor& a, const Tensor& b);
// a + b.
Tensor add(const Tensor& a, const Tensor& b);
void copy(const Tensor& to, const Tensor& from);
// Checks whether a gradient is required while gradients are recorded.
bool wants_gradient(const Tensor& tensor);

}  // namespace q6k

// Tensors through torch's stable C interface: what a tensor is, new ones, and the few torch operations needed here.
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

// "bfloat16", as torch has it without its prefix.
std::string dtype_name(int32_t dtype);
// One of bfloat16, float16 and float32, by its name.
int32_t dtype_named(const std::string& name);
// The place of a dtype in `reference.FLOATS`, bf16, fp16, fp32; -1 if it is none of them.
inline int float_kind(int32_t dtype) {
  const Dtypes& all = dtypes();
  return dtype == all.bf16 ? 0 : dtype == all.fp16 ? 1 : dtype == all.fp32 ? 2 : -1;
}

// A tensor that is owned, and what it is, read once.
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

// "(2, 256)", "(3,)", as Python has tuples.
std::string shape_text(const std::vector<int64_t>& shape);
// "cuda:0".
std::string device_text(const Tensor& tensor);

// A new contiguous tensor on `like`'s device, with whatever is in memory.
Tensor empty(const std::vector<int64_t>& shape, int32_t dtype, const Tensor& like);
// A contiguous tensor with its content, itself perhaps; aligned to that many bytes, if not 0.
Tensor contiguous(const Tensor& tensor, int64_t alignment = 0);
// A view of its memory, `offset` elements on from where the tensor begins.
Tensor view(const Tensor& tensor, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
            int64_t offset);
// a b in fp32, both 16-bit matrices.
Tensor multiply_fp32(const Tensor& a, const Tensor& b);
// a + b.
Tensor add(const Tensor& a, const Tensor& b);
void copy(const Tensor& to, const Tensor& from);
// Whether a gradient is asked for while gradients are recorded.
bool wants_gradient(const Tensor& tensor);

}  // namespace q6k

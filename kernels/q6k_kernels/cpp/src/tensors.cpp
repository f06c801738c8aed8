#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cctype>

namespace q6k {
namespace {

using torch::headeronly::ScalarType;

template <typename T>
StableIValue boxed(const T& value) {
  return torch::stable::detail::from<T>(value);
}

// A new reference, which the receiver has to release.
AtenTensorHandle again(const Tensor& tensor) {
  AtenTensorHandle handle;
  Q6K_TORCH(aoti_torch_new_tensor_handle(tensor.handle(), &handle));
  return handle;
}

template <size_t COUNT>
StableIValue call(const char* name, const char* overload, StableIValue (&&stack)[COUNT]) {
  if (torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION) != 0) {
    throw std::runtime_error(std::string("torch refused ") + name);
  }
  return stack[0];
}

Tensor tensor_of(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }

}  // namespace

std::string dtype_name(int32_t dtype) {
  static const std::pair<ScalarType, const char*> names[] = {
      {ScalarType::BFloat16, "bfloat16"}, {ScalarType::Half, "float16"},   {ScalarType::Float, "float32"},
      {ScalarType::Double, "float64"},    {ScalarType::Byte, "uint8"},     {ScalarType::Char, "int8"},
      {ScalarType::Short, "int16"},       {ScalarType::Int, "int32"},      {ScalarType::Long, "int64"},
      {ScalarType::UInt16, "uint16"},     {ScalarType::UInt32, "uint32"},  {ScalarType::UInt64, "uint64"},
      {ScalarType::Bool, "bool"},         {ScalarType::ComplexHalf, "complex32"},
      {ScalarType::ComplexFloat, "complex64"}, {ScalarType::ComplexDouble, "complex128"},
      {ScalarType::Float8_e5m2, "float8_e5m2"}, {ScalarType::Float8_e4m3fn, "float8_e4m3fn"},
  };
  for (const auto& [type, name] : names) {
    if (torch::stable::detail::to<int32_t>(boxed(type)) == dtype) return name;
  }
  return "dtype " + std::to_string(dtype);
}

int32_t dtype_named(const std::string& name) {
  for (const int32_t dtype : {dtypes().bf16, dtypes().fp16, dtypes().fp32}) {
    if (dtype_name(dtype) == name) return dtype;
  }
  throw std::invalid_argument("dtype: expected bfloat16, float16 or float32, found '" + name + "'");
}

Tensor::Tensor(AtenTensorHandle owned) : handle_(owned) {
  int64_t *sizes, *strides;
  Q6K_TORCH(aoti_torch_get_dim(handle_, &dim_));
  Q6K_TORCH(aoti_torch_get_sizes(handle_, &sizes));
  Q6K_TORCH(aoti_torch_get_strides(handle_, &strides));
  Q6K_TORCH(aoti_torch_get_dtype(handle_, &dtype_));
  Q6K_TORCH(aoti_torch_get_device_type(handle_, &device_type_));
  Q6K_TORCH(aoti_torch_get_device_index(handle_, &device_index_));
  sizes_ = sizes, strides_ = strides;
}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(handle_, other.handle_);
  dim_ = other.dim_, sizes_ = other.sizes_, strides_ = other.strides_;
  dtype_ = other.dtype_, device_type_ = other.device_type_, device_index_ = other.device_index_;
  return *this;
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int64_t i = 0; i < dim_; ++i) count *= sizes_[i];
  return count;
}

bool Tensor::is_contiguous() const {
  bool is;
  Q6K_TORCH(aoti_torch_is_contiguous(handle_, &is));
  return is;
}

void* Tensor::data() const {
  void* pointer;
  Q6K_TORCH(aoti_torch_get_data_ptr(handle_, &pointer));
  return pointer;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::string device_text(const Tensor& tensor) {
  const int32_t type = tensor.device_type();
  const std::string name = type == aoti_torch_device_type_cpu()    ? "cpu"
                           : type == aoti_torch_device_type_cuda() ? "cuda"
                           : type == aoti_torch_device_type_meta() ? "meta"
                                                                   : "device type " + std::to_string(type);
  return tensor.device_index() < 0 || name == "cpu" ? name : name + ":" + std::to_string(tensor.device_index());
}

Tensor empty(const std::vector<int64_t>& shape, int32_t dtype, const Tensor& like) {
  int64_t strides[64], next = 1;
  if (shape.size() > 64) {  // most of torch's own operations have the same limit
    throw std::invalid_argument("expected at most 64 dimensions, found a shape of " + shape_text(shape));
  }
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = next;
    next *= std::max<int64_t>(1, shape[i]);
  }
  AtenTensorHandle handle;
  Q6K_TORCH(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides, dtype,
                                     like.device_type(), like.device_index(), &handle));
  return Tensor(handle);
}

Tensor contiguous(const Tensor& tensor, int64_t alignment) {
  Tensor found = tensor_of(call("aten::contiguous", "",
                                {boxed(again(tensor)), boxed(torch::headeronly::MemoryFormat::Contiguous)}));
  if (alignment == 0 || found.is_aligned(alignment)) return found;
  AtenTensorHandle copied;
  Q6K_TORCH(aoti_torch_clone(found.handle(), &copied));
  return Tensor(copied);
}

Tensor view(const Tensor& tensor, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
            int64_t offset) {
  int64_t begin;
  AtenTensorHandle handle;
  Q6K_TORCH(aoti_torch_get_storage_offset(tensor.handle(), &begin));
  Q6K_TORCH(aoti_torch__reinterpret_tensor(tensor.handle(), static_cast<int64_t>(shape.size()), shape.data(),
                                           strides.data(), begin + offset, &handle));
  return Tensor(handle);
}

Tensor multiply_fp32(const Tensor& a, const Tensor& b) {
  return tensor_of(call("aten::mm", "dtype", {boxed(again(a)), boxed(again(b)), boxed(ScalarType::Float)}));
}

Tensor add(const Tensor& a, const Tensor& b) {
  // The stable interface has subtraction but no addition; a - (-b) has the same bits.
  const Tensor minus = tensor_of(call("aten::neg", "", {boxed(again(b))}));
  AtenTensorHandle sum;
  Q6K_TORCH(aoti_torch_aten_subtract_Tensor(a.handle(), minus.handle(), 1.0, &sum));
  return Tensor(sum);
}

void copy(const Tensor& to, const Tensor& from) { Q6K_TORCH(aoti_torch_copy_(to.handle(), from.handle(), 0)); }

bool wants_gradient(const Tensor& tensor) {
  if (!aoti_torch_grad_mode_is_enabled()) return false;
  // The stable interface cannot tell directly, but a view made here is not a leaf if a gradient flows through it.
  const StableIValue alias = call("aten::alias", "", {boxed(again(tensor))});
  return !torch::stable::detail::to<bool>(call("aten::is_leaf", "", {alias}));
}

}  // namespace q6k

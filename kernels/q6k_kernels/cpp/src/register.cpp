// Registration of the operations with torch: schemas, and boxed functions for the CPU and for CUDA.
//
// Python may register them before or after. A schema that exists already stays; of two implementations torch uses the
// later one, and ops/schema.py registers none where one exists.
#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <cstdlib>

#include "cpu.h"
#include "gpu.h"

extern "C" {
// Since torch 2.12; before, an operation has no tag, which matters only to callers that read tags.
__attribute__((weak)) AOTITorchError torch_library_def_with_tags(TorchLibraryHandle, const char*, const int32_t*,
                                                                 int32_t);
__attribute__((weak)) int32_t torch_tag_pt2_compliant_tag();
}

namespace q6k {
namespace {

// Takes ownership of a call's arguments, so that they are released also when an exception is thrown.
Tensor take_tensor(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }

std::optional<Tensor> take_optional(StableIValue value) {
  // torch allocates the optional and the receiver has to free it, which torch's own conversion does.
  const auto taken = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
  if (!taken) return std::nullopt;
  return Tensor(*taken);
}

std::string take_string(StableIValue value) {
  // By hand, as torch's own conversion leaks memory.
  const auto handle = torch::stable::detail::to<StringHandle>(value);
  size_t length = 0;
  const char* text = "";
  const bool fine = torch_string_length(handle, &length) == 0 && torch_string_c_str(handle, &text) == 0;
  std::string taken(text, fine ? length : 0);
  Q6K_TORCH(torch_delete_string(handle));
  return taken;
}

std::vector<Tensor> take_tensors(StableIValue value) {
  const auto list = torch::stable::detail::to<StableListHandle>(value);
  size_t count = 0;
  Q6K_TORCH(torch_list_size(list, &count));
  std::vector<Tensor> taken;
  for (size_t i = 0; i < count; ++i) {
    StableIValue item = 0;
    Q6K_TORCH(torch_list_get_item(list, i, &item));
    taken.push_back(take_tensor(item));
  }
  Q6K_TORCH(torch_delete_list(list));
  return taken;
}

int64_t take_integer(StableIValue value) { return torch::stable::detail::to<int64_t>(value); }

void give(StableIValue* stack, Tensor&& result) { stack[0] = torch::stable::detail::from(result.release()); }

template <bool CUDA>
void linear(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]), tiles = take_tensor(stack[1]);
  const std::optional<Tensor> bias = take_optional(stack[2]);
  const int64_t n = take_integer(stack[3]);
  const std::string format = take_string(stack[4]), activations = take_string(stack[5]);
  const WeightType& type = check_linear(x, tiles, bias, n, format, activations, CUDA);
  give(stack, (CUDA ? linear_cuda : linear_cpu)(x, tiles, bias, n, x.size(-1), type, activations_of(activations)));
}

// A dtype, or its name.
template <bool NAMED>
int32_t take_dtype(StableIValue value) {
  if constexpr (NAMED) return dtype_named(take_string(value));
  return torch::stable::detail::to<int32_t>(value);
}

template <bool CUDA, bool NAMED>
void embedding(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor indices = take_tensor(stack[0]), tiles = take_tensor(stack[1]);
  const int64_t n = take_integer(stack[2]), k = take_integer(stack[3]);
  const std::string format = take_string(stack[4]);
  const int32_t dtype = take_dtype<NAMED>(stack[5]);
  const WeightType& type = weight_type(format);
  check_embedding(indices, tiles, n, k, type, dtype);
  give(stack, (CUDA ? embedding_cuda : embedding_cpu)(indices, tiles, n, k, type, dtype));
}

template <bool CUDA, bool NAMED>
void dequantize(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor tiles = take_tensor(stack[0]);
  const int64_t n = take_integer(stack[1]), k = take_integer(stack[2]);
  const std::string format = take_string(stack[3]);
  const int32_t dtype = take_dtype<NAMED>(stack[4]);
  const WeightType& type = weight_type(format);
  check_dequantize(tiles, n, k, type, dtype);
  give(stack, (CUDA ? dequantize_cuda : dequantize_cpu)(tiles, n, k, type, dtype));
}

template <bool CUDA>
void pack(StableIValue* stack, uint64_t, uint64_t) {
  const std::vector<Tensor> planes = take_tensors(stack[0]);
  const std::string format = take_string(stack[1]);
  const WeightType& type = weight_type(format);
  give(stack, (CUDA ? pack_cuda : pack_cpu)(planes, type, check_pack(planes, type)));
}

struct Operation {
  const char *name, *schema;
  void (*cpu)(StableIValue*, uint64_t, uint64_t);
  void (*cuda)(StableIValue*, uint64_t, uint64_t);
};

constexpr Operation OPERATIONS[] = {
    {"linear", "linear(Tensor x, Tensor tiles, Tensor? bias, SymInt n, str format, str activations) -> Tensor",
     linear<false>, linear<true>},
    {"embedding",
     "embedding(Tensor indices, Tensor tiles, SymInt n, SymInt k, str format, ScalarType dtype) -> Tensor",
     embedding<false, false>, embedding<true, false>},
    {"dequantize", "dequantize(Tensor tiles, SymInt n, SymInt k, str format, ScalarType dtype) -> Tensor",
     dequantize<false, false>, dequantize<true, false>},
    {"pack", "pack(Tensor[] planes, str format) -> Tensor", pack<false>, pack<true>},
    {"embedding_named",
     "embedding_named(Tensor indices, Tensor tiles, SymInt n, SymInt k, str format, str dtype) -> Tensor",
     embedding<false, true>, embedding<true, true>},
    {"dequantize_named", "dequantize_named(Tensor tiles, SymInt n, SymInt k, str format, str dtype) -> Tensor",
     dequantize<false, true>, dequantize<true, true>},
};

// Registers while the library loads. Nothing here throws: an exception would end the process.
class Registration {
 public:
  Registration() {
    // Set if Python has defined the schemas: defining them again would fail, and torch 2.11 prints that.
    const char* const defined = std::getenv("Q6K_OPS_DEFINED");
    if (!defined || std::to_string(getpid()) != defined) define();
    implement("CPU", cpu_, &Operation::cpu);
    implement("CUDA", cuda_, &Operation::cuda);
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

 private:
  void define() {
    if (aoti_torch_library_init_fragment("q6k", __FILE__, __LINE__, &schemas_) != 0) return;
    for (const Operation& each : OPERATIONS) {
      if (torch_library_def_with_tags && torch_tag_pt2_compliant_tag) {
        const int32_t tag = torch_tag_pt2_compliant_tag();
        torch_library_def_with_tags(schemas_, each.schema, &tag, 1);
      } else {
        aoti_torch_library_def(schemas_, each.schema);
      }
    }
  }
  static void implement(const char* key, TorchLibraryHandle& library,
                        void (*Operation::*function)(StableIValue*, uint64_t, uint64_t)) {
    if (aoti_torch_library_init_impl("q6k", key, __FILE__, __LINE__, &library) != 0) return;
    for (const Operation& each : OPERATIONS) {
      torch_library_impl(library, each.name, each.*function, TORCH_ABI_VERSION);
    }
  }

  // Never freed: the operations exist until the process ends.
  TorchLibraryHandle schemas_ = nullptr, cpu_ = nullptr, cuda_ = nullptr;
};

const Registration registration;

}  // namespace
}  // namespace q6k

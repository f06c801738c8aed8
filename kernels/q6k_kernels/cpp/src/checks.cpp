#include "checks.h"

namespace q6k {
namespace {

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument(text); }

std::string found(const Tensor& tensor) { return dtype_name(tensor.dtype()) + " " + shape_text(tensor.shape()); }

std::string strides_text(const Tensor& tensor) {
  std::vector<int64_t> strides;
  for (int64_t i = 0; i < tensor.dim(); ++i) strides.push_back(tensor.stride(i));
  return shape_text(strides);
}

using Named = std::pair<const char*, const Tensor*>;

void check_devices(const std::vector<Named>& tensors) {
  const Tensor* first = nullptr;
  bool same = true;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor) continue;
    if (!first) first = tensor;
    same = same && tensor->on_device_of(*first);
  }
  if (same) return;
  std::string text;
  for (const auto& [name, tensor] : tensors) {
    if (tensor) text += (text.empty() ? "" : ", ") + std::string(name) + " on " + device_text(*tensor);
  }
  refuse("expected all tensors on one device, found " + text);
}

const Tensor* address(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

int32_t dtype_of(const PlaneArray& array) {
  const std::string name = array.dtype;
  return name == "U8" ? dtypes().uint8 : name == "I8" ? dtypes().int8 : name == "BF16" ? dtypes().bf16 : dtypes().fp16;
}

void check_tiles(const Tensor& tiles, int64_t n, int64_t k, const WeightType& type) {
  const int64_t dim = tiles.dim();
  if (tiles.dtype() != dtypes().uint8 || dim != 3 || tiles.size(-1) != type.tile_bytes || tiles.size(-2) < 1 ||
      !tiles.is_contiguous()) {
    refuse("tiles of " + std::string(type.name) + ": expected contiguous uint8 (T, B, tile_bytes) with tile_bytes " +
           std::to_string(type.tile_bytes) + ", found " + found(tiles) + ", strides " + strides_text(tiles) +
           (dim == 4 ? "; of a stack of experts take one, weight[expert]" : ""));
  }
  const int64_t row_tiles = tiles.size(0);
  if (n < 1 || n > (int64_t{1} << 31) - 1 || row_tiles != ceil_div(n, TILE_ROWS)) {
    refuse("n: " + std::to_string(row_tiles) + " tiles of " + std::to_string(TILE_ROWS) + " hold " +
           std::to_string(TILE_ROWS * (row_tiles - 1) + 1) + " to " + std::to_string(TILE_ROWS * row_tiles) +
           " rows, found " + std::to_string(n));
  }
  const int64_t blocks = tiles.size(-2);
  if (k < 1 || k % type.block || blocks != super_blocks(k)) {
    refuse("k: " + std::to_string(blocks) + " tiles of " + std::to_string(SUPER_BLOCK) + " columns hold " +
           std::to_string(SUPER_BLOCK * (blocks - 1) + 1) + " to " + std::to_string(SUPER_BLOCK * blocks) +
           " weights of a row, and " + type.name + " has multiples of " + std::to_string(type.block) + "; found " +
           std::to_string(k));
  }
}

void check_dtype(int32_t dtype) {
  if (float_kind(dtype) < 0) {
    refuse("dtype: expected bfloat16, float16 or float32, found torch." + dtype_name(dtype));
  }
}

std::string quoted(const std::string& text) { return "'" + text + "'"; }

}  // namespace

const WeightType& check_linear(const Tensor& x, const Tensor& tiles, const std::optional<Tensor>& bias, int64_t n,
                               const std::string& format, const std::string& activations, bool halves) {
  const int64_t k = x.dim() == 0 ? 0 : x.size(-1);
  const int kind = float_kind(x.dtype());
  if (x.dim() == 0 || kind < 0 || (halves && kind == 2)) {
    refuse(std::string("x: expected ") + (halves ? "bfloat16 or float16" : "bfloat16, float16 or float32") + " (..., " +
           std::to_string(k) + "), found " + found(x));
  }
  if (bias && (float_kind(bias->dtype()) < 0 || bias->dim() != 1 || bias->size(0) != n)) {
    refuse("bias: expected bfloat16, float16 or float32 (" + std::to_string(n) + ",), found " + found(*bias));
  }
  const WeightType& type = weight_type(format);
  check_tiles(tiles, n, k, type);
  if (activations != "auto" && activations != "int8" && activations != "bf16") {
    refuse("activations: expected auto, int8 or bf16, found " + quoted(activations));
  }
  check_devices({{"x", &x}, {"tiles", &tiles}, {"bias", address(bias)}});
  for (const auto& [name, tensor] : {Named{"x", &x}, Named{"bias", address(bias)}}) {
    if (tensor && wants_gradient(*tensor)) {
      refuse(std::string(name) +
             " requires a gradient, and q6k::linear has none: call it under torch.inference_mode() or "
             "torch.no_grad(), or pass " +
             name + ".detach()");
    }
  }
  return type;
}

void check_embedding(const Tensor& indices, const Tensor& tiles, int64_t n, int64_t k, const WeightType& type,
                     int32_t dtype) {
  check_tiles(tiles, n, k, type);
  check_dtype(dtype);
  if (indices.dtype() != dtypes().int64 && indices.dtype() != dtypes().int32) {
    refuse("indices: expected int64 or int32 of any shape, found torch." + dtype_name(indices.dtype()));
  }
  check_devices({{"indices", &indices}, {"tiles", &tiles}});
}

void check_dequantize(const Tensor& tiles, int64_t n, int64_t k, const WeightType& type, int32_t dtype) {
  check_tiles(tiles, n, k, type);
  check_dtype(dtype);
}

std::vector<int64_t> check_pack(const std::vector<Tensor>& planes, const WeightType& type) {
  if (planes.size() != static_cast<size_t>(type.count)) {
    std::string roles;
    for (int i = 0; i < type.count; ++i) roles += (i ? ", " : "") + std::string(type.arrays[i].role);
    refuse("planes: " + std::string(type.name) + " has " + roles + "; found " + std::to_string(planes.size()) + " tensors");
  }
  const PlaneArray& first = type.arrays[0];
  const Tensor& codes = planes[0];
  if ((codes.dim() != 2 && codes.dim() != 3) || codes.dtype() != dtype_of(first) || codes.numel() == 0 ||
      codes.size(-1) * first.weights % type.block) {
    const std::string width = "K/" + std::to_string(first.weights);
    refuse(std::string(first.role) + ": expected " + dtype_name(dtype_of(first)) + " (N, " + width + ") or (E, N, " +
           width + "), N >= 1, K a multiple of " + std::to_string(type.block) + ", found " + found(codes));
  }
  const int64_t k = codes.size(-1) * first.weights;
  std::vector<Named> named;
  for (int i = 0; i < type.count; ++i) {
    const PlaneArray& array = type.arrays[i];
    const Tensor& tensor = planes[static_cast<size_t>(i)];
    std::vector<int64_t> shape = codes.shape();
    shape.back() = k / array.weights;
    if (tensor.dtype() != dtype_of(array) || tensor.shape() != shape) {
      refuse(std::string(array.role) + " of " + type.name + ": with " + first.role + " of shape " +
             shape_text(codes.shape()) + " expected " + dtype_name(dtype_of(array)) + " " + shape_text(shape) +
             ", found " + found(tensor));
    }
    named.push_back({array.role, &tensor});
  }
  check_devices(named);
  std::vector<int64_t> shape = codes.shape();
  shape.pop_back();
  const int64_t n = shape.back();
  shape.back() = ceil_div(n, TILE_ROWS);
  shape.push_back(super_blocks(k));
  shape.push_back(type.tile_bytes);
  return shape;
}

Activations activations_of(const std::string& name) {
  return name == "auto" ? Activations::AUTO : name == "int8" ? Activations::INT8 : Activations::BF16;
}

void check_aligned(const Tensor& tiles) {
  if (tiles.is_aligned(ALIGNMENT)) return;
  char at[32];
  std::snprintf(at, sizeof at, "%#llx", static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(tiles.data())));
  refuse("tiles: expected memory aligned to " + std::to_string(ALIGNMENT) + " bytes, found " + at + "; clone them");
}

}  // namespace q6k

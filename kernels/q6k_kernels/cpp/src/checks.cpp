#include "checks.h"

namespace q6k {
namespace {

constexpr int64_t GROUP = 16;

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument(text); }

std::string found(const Tensor& tensor) { return dtype_name(tensor.dtype()) + " " + shape_text(tensor.shape()); }

std::string strides_text(const Tensor& tensor) {
  std::vector<int64_t> strides;
  for (int64_t i = 0; i < tensor.dim(); ++i) strides.push_back(tensor.stride(i));
  return shape_text(strides);
}

using Named = std::pair<const char*, const Tensor*>;

void check_devices(std::initializer_list<Named> tensors) {
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

int64_t check_tiles(const Tensor& tiles, int64_t n) {
  const int64_t dim = tiles.dim();
  if (tiles.dtype() != dtypes().uint8 || dim != 3 ||
      (tiles.size(-1) != TILE_BYTES_BF16 && tiles.size(-1) != TILE_BYTES_EXACT) || tiles.size(-2) < 1 ||
      !tiles.is_contiguous()) {
    refuse("tiles: expected contiguous uint8 (T, B, tile_bytes) with tile_bytes " + std::to_string(TILE_BYTES_BF16) +
           " (bf16 scales) or " + std::to_string(TILE_BYTES_EXACT) + " (exact scales), found " + found(tiles) +
           ", strides " + strides_text(tiles) +
           (dim == 4 ? "; of a stack of experts take one, weight[expert]" : ""));
  }
  const int64_t row_tiles = tiles.size(0);
  if (n < 1 || n > (int64_t{1} << 31) - 1 || row_tiles != ceil_div(n, TILE_ROWS)) {
    refuse("n: " + std::to_string(row_tiles) + " tiles of " + std::to_string(TILE_ROWS) + " hold " +
           std::to_string(TILE_ROWS * (row_tiles - 1) + 1) + " to " + std::to_string(TILE_ROWS * row_tiles) +
           " rows, found " + std::to_string(n));
  }
  return tiles.size(-2) * SUPER_BLOCK;
}

void check_dtype(int32_t dtype) {
  if (float_kind(dtype) < 0) {
    refuse("dtype: expected bfloat16, float16 or float32, found torch." + dtype_name(dtype));
  }
}

std::string quoted(const std::string& text) { return "'" + text + "'"; }

}  // namespace

int64_t check_linear(const Tensor& x, const Tensor& tiles, const std::optional<Tensor>& bias, int64_t n,
                     const std::string& activations, bool halves) {
  const int64_t k = check_tiles(tiles, n);
  const int kind = float_kind(x.dtype());
  if (x.dim() == 0 || kind < 0 || (halves && kind == 2) || x.size(-1) != k) {
    refuse(std::string("x: expected ") + (halves ? "bfloat16 or float16" : "bfloat16, float16 or float32") + " (..., " +
           std::to_string(k) + "), found " + found(x));
  }
  if (bias && (float_kind(bias->dtype()) < 0 || bias->dim() != 1 || bias->size(0) != n)) {
    refuse("bias: expected bfloat16, float16 or float32 (" + std::to_string(n) + ",), found " + found(*bias));
  }
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
  return k;
}

int64_t check_embedding(const Tensor& indices, const Tensor& tiles, int64_t n, int32_t dtype) {
  const int64_t k = check_tiles(tiles, n);
  check_dtype(dtype);
  if (indices.dtype() != dtypes().int64 && indices.dtype() != dtypes().int32) {
    refuse("indices: expected int64 or int32 of any shape, found torch." + dtype_name(indices.dtype()));
  }
  check_devices({{"indices", &indices}, {"tiles", &tiles}});
  return k;
}

int64_t check_dequantize(const Tensor& tiles, int64_t n, int32_t dtype) {
  const int64_t k = check_tiles(tiles, n);
  check_dtype(dtype);
  return k;
}

std::vector<int64_t> check_pack(const Tensor& ql, const Tensor& qh, const Tensor& scale,
                                const std::optional<Tensor>& steps) {
  if ((ql.dim() != 2 && ql.dim() != 3) || ql.dtype() != dtypes().uint8 || ql.numel() == 0 ||
      2 * ql.size(-1) % SUPER_BLOCK) {
    refuse("ql: expected uint8 (N, K/2) or (E, N, K/2), N >= 1, K a multiple of " + std::to_string(SUPER_BLOCK) +
           ", found " + found(ql));
  }
  const int64_t k = 2 * ql.size(-1);
  const auto expect = [&](const char* name, const Tensor& tensor, int32_t dtype, int64_t width) {
    std::vector<int64_t> shape = ql.shape();
    shape.back() = width;
    if (tensor.dtype() == dtype && tensor.shape() == shape) return;
    refuse(std::string(name) + ": with ql of shape " + shape_text(ql.shape()) + " expected " + dtype_name(dtype) + " " +
           shape_text(shape) + ", found " + found(tensor));
  };
  expect("qh", qh, dtypes().uint8, k / 4);
  if (steps) {
    expect("scale with steps", scale, dtypes().int8, k / GROUP);
    expect("steps", *steps, dtypes().fp16, k / SUPER_BLOCK);
  } else {
    expect("scale without steps", scale, dtypes().bf16, k / GROUP);
  }
  check_devices({{"ql", &ql}, {"qh", &qh}, {"scale", &scale}, {"steps", address(steps)}});
  std::vector<int64_t> shape = ql.shape();
  shape.pop_back();
  const int64_t n = shape.back();
  shape.back() = ceil_div(n, TILE_ROWS);
  shape.push_back(k / SUPER_BLOCK);
  shape.push_back(tile_bytes(steps.has_value()));
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

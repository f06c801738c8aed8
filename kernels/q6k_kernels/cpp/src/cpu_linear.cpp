#include <algorithm>

#include "cpu.h"
#include "parallel.h"
#include "tiles.h"

namespace q6k {
namespace {

constexpr int ACTIVATION_GROUP = 32;
constexpr int ROWS = TILE_ROWS;

float bias_at(const void* bias, int kind, int64_t row) {
  if (kind == 0) return static_cast<float>(static_cast<const Bf16*>(bias)[row]);
  if (kind == 1) return static_cast<float>(static_cast<const Fp16*>(bias)[row]);
  return static_cast<const float*>(bias)[row];
}

// The arguments of every product.
struct Matrix {
  const unsigned char* tiles;
  const void* bias;  // null for none
  int bias_kind;
  int64_t m, n, k;
  const WeightType* type;

  int64_t blocks() const { return super_blocks(k); }
  int64_t width() const { return blocks() * SUPER_BLOCK; }
  const unsigned char* tile(int64_t row_tile, int64_t block) const {
    return tiles + (row_tile * blocks() + block) * type->tile_bytes;
  }
  // Rounds the sums (m, 16) of a tile of rows into y (m, n).
  template <typename T, typename Sum>
  void store(T* y, int64_t row_tile, const Sum* sums) const {
    for (int64_t token = 0; token < m; ++token) {
      for (int64_t r = 0; r < ROWS && row_tile * ROWS + r < n; ++r) {
        const int64_t row = row_tile * ROWS + r;
        float sum = static_cast<float>(sums[token * ROWS + r]);
        if (bias) sum += bias_at(bias, bias_kind, row);
        y[token * n + row] = static_cast<T>(sum);
      }
    }
  }
};

// Activations (m, k) as (m, width), zeros past k.
template <typename To, typename T>
std::vector<To> padded(const Matrix& matrix, const T* x) {
  std::vector<To> wide(static_cast<size_t>(matrix.m * matrix.width()));
  for (int64_t token = 0; token < matrix.m; ++token) {
    std::copy_n(x + token * matrix.k, matrix.k, wide.begin() + token * matrix.width());
  }
  return wide;
}

// 16-bit activations, or fp32: a product for each super-block, then their sum. `Sum` is fp32 for bf16 activations, else fp64.
template <typename T, typename Sum>
void multiply_bf16(const Matrix& matrix, const T* x, T* y) {
  const std::vector<Sum> wide = padded<Sum>(matrix, x);
  parallel_for(ceil_div(matrix.n, ROWS), [&](int64_t row_tile) {
    std::vector<Sum> sums(static_cast<size_t>(matrix.m * ROWS));
    Sum columns[SUPER_BLOCK][ROWS];
    for (int64_t block = 0; block < matrix.blocks(); ++block) {
      for (int r = 0; r < ROWS; ++r) {
        T weights[SUPER_BLOCK];
        read_weights(matrix.tile(row_tile, block), r, *matrix.type, weights);
        for (int i = 0; i < SUPER_BLOCK; ++i) columns[i][r] = static_cast<Sum>(weights[i]);
      }
      for (int64_t token = 0; token < matrix.m; ++token) {
        const Sum* const values = wide.data() + token * matrix.width() + block * SUPER_BLOCK;
        Sum part[ROWS] = {};
        for (int i = 0; i < SUPER_BLOCK; ++i) {
          for (int r = 0; r < ROWS; ++r) part[r] += values[i] * columns[i][r];
        }
        for (int r = 0; r < ROWS; ++r) sums[static_cast<size_t>(token * ROWS + r)] += part[r];
      }
    }
    matrix.store(y, row_tile, sums.data());
  });
}

// Activations to 8 bits in groups of 32: `reference.quantize_activations`, to the bit.
template <typename T>
void quantize(const T* x, int64_t count, signed char* a, float* d_a) {
  for (int64_t group = 0; group < count / ACTIVATION_GROUP; ++group) {
    const T* const values = x + group * ACTIVATION_GROUP;
    float largest = 0.0f;
    bool finite = true;
    for (int i = 0; i < ACTIVATION_GROUP; ++i) {
      const float value = std::fabs(static_cast<float>(values[i]));
      finite = finite && std::isfinite(value);
      largest = value > largest ? value : largest;
    }
    const float d = finite ? largest / 127.0f : std::nanf("");
    for (int i = 0; i < ACTIVATION_GROUP; ++i) {
      const float quotient = d > 0.0f ? std::nearbyint(static_cast<float>(values[i]) / d) : 0.0f;
      a[group * ACTIVATION_GROUP + i] = static_cast<signed char>(std::fmin(std::fmax(quotient, -127.0f), 127.0f));
    }
    d_a[group] = d;
  }
}

// 8-bit activations: integer sums of groups, scaled in fp32 and added by super-block.
template <typename T>
void multiply_int8(const Matrix& matrix, const T* x, T* y) {
  const WeightType& type = *matrix.type;
  const int64_t group = type.group, groups = SUPER_BLOCK / group;
  const std::vector<T> wide = padded<T>(matrix, x);
  const int64_t count = matrix.m * matrix.width();
  std::vector<signed char> a(static_cast<size_t>(count));
  std::vector<float> d_a(static_cast<size_t>(count / ACTIVATION_GROUP));
  quantize(wide.data(), count, a.data(), d_a.data());
  parallel_for(ceil_div(matrix.n, ROWS), [&](int64_t row_tile) {
    std::vector<float> sums(static_cast<size_t>(matrix.m * ROWS));
    int columns[SUPER_BLOCK][ROWS];
    float scales[MOST_GROUPS][ROWS], minimums[MOST_GROUPS][ROWS] = {};
    for (int64_t block = 0; block < matrix.blocks(); ++block) {
      const unsigned char* const tile = matrix.tile(row_tile, block);
      for (int r = 0; r < ROWS; ++r) {
        const RowParts row(tile, r, type);
        for (int i = 0; i < SUPER_BLOCK; ++i) columns[i][r] = row.q[i];
        for (int64_t j = 0; j < groups; ++j) {
          scales[j][r] = row.scale[j];
          if (type.minimum) minimums[j][r] = row.minimum[j];
        }
      }
      for (int64_t token = 0; token < matrix.m; ++token) {
        const int64_t begin = token * matrix.width() + block * SUPER_BLOCK;
        float part[ROWS] = {};
        for (int64_t j = 0; j < groups; ++j) {
          const float d = d_a[static_cast<size_t>((begin + j * group) / ACTIVATION_GROUP)];
          int inner[ROWS] = {}, all = 0;
          for (int64_t i = j * group; i < (j + 1) * group; ++i) {
            const int value = a[static_cast<size_t>(begin + i)];
            all += value;
            for (int r = 0; r < ROWS; ++r) inner[r] += value * columns[i][r];
          }
          for (int r = 0; r < ROWS; ++r) {
            float term = static_cast<float>(inner[r]) * scales[j][r];
            if (type.minimum) term -= static_cast<float>(all) * minimums[j][r];
            part[r] += term * d;
          }
        }
        for (int r = 0; r < ROWS; ++r) sums[static_cast<size_t>(token * ROWS + r)] += part[r];
      }
    }
    matrix.store(y, row_tile, sums.data());
  });
}

template <typename T, typename Sum>
void multiply(const Matrix& matrix, const void* x, void* y, Activations activations) {
  const T* const from = static_cast<const T*>(x);
  T* const to = static_cast<T*>(y);
  // On the CPU "auto" does not round activations, see `reference.linear`.
  if (activations == Activations::INT8) {
    multiply_int8<T>(matrix, from, to);
  } else {
    multiply_bf16<T, Sum>(matrix, from, to);
  }
}

}  // namespace

Tensor linear_cpu(const Tensor& x, const Tensor& tiles, const std::optional<Tensor>& bias, int64_t n, int64_t k,
                  const WeightType& type, Activations activations) {
  std::vector<int64_t> shape = x.shape();
  shape.back() = n;
  Tensor y = empty(shape, x.dtype(), x);
  if (y.numel() == 0) return y;
  const Tensor rows = contiguous(x);
  std::optional<Tensor> values;
  if (bias) values = contiguous(*bias);
  const Matrix matrix = {static_cast<const unsigned char*>(tiles.data()),
                         values ? values->data() : nullptr,
                         values ? float_kind(values->dtype()) : 0,
                         y.numel() / n,
                         n,
                         k,
                         &type};
  switch (float_kind(x.dtype())) {
    case 0:
      multiply<Bf16, float>(matrix, rows.data(), y.data(), activations);
      break;
    case 1:
      multiply<Fp16, double>(matrix, rows.data(), y.data(), activations);
      break;
    default:
      multiply<float, double>(matrix, rows.data(), y.data(), activations);
  }
  return y;
}

}  // namespace q6k

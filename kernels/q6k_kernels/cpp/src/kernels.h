// The library's kernels: found in it, loaded to a GPU when they are first needed, and launched.
//
// May be called from any thread, for any GPU, and while a CUDA graph is captured, as jit.py's.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>

#include "driver.h"
#include "plans.h"

namespace q6k {

// In the order of `FILES` in units.py.
enum File : uint16_t { DECODE, QUANTIZE_ROWS, GEMM_WGMMA, GEMM_MMA, ROWS, PACK };

// A file of device code and the values of its macros, in the order of `MACROS` in units.py.
struct Key {
  uint16_t file = 0, count = 0, values[MOST_VALUES] = {};

  Key() = default;
  Key(File of, std::initializer_list<int64_t> macros) : file(of) {
    for (const int64_t value : macros) add(value);
  }
  // Those of the weight type come first.
  Key(File of, const WeightType& type, std::initializer_list<int64_t> others) : file(of) {
    for (const int64_t value : type.macros) add(value);
    for (const int64_t value : others) add(value);
  }
  bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }

 private:
  void add(int64_t value) { values[count++] = static_cast<uint16_t>(value); }
};
static_assert(sizeof(Key) == (2 + MOST_VALUES) * sizeof(uint16_t), "compared as bytes: no padding");

// A kernel's parameters, packed as the compiler lays them out, and no further than the last ends.
class Arguments {
 public:
  template <typename... T>
  explicit Arguments(const T&... values) {
    (append(values), ...);
  }
  // `size` bytes that begin at `at`.
  void append_at(size_t at, const void* from, size_t size) {
    size_ = at;
    std::memcpy(bytes_ + size_, from, size);
    size_ += size;
  }
  const unsigned char* data() const { return bytes_; }
  size_t size() const { return size_; }

 private:
  template <typename T>
  void append(const T& value) {
    append_at((size_ + alignof(T) - 1) / alignof(T) * alignof(T), &value, sizeof value);
  }
  alignas(64) unsigned char bytes_[384] = {};
  size_t size_ = 0;
};

// What a launch is, besides the kernel and its parameters; `jit.Kernel.launch` says what each means.
struct Launch {
  int64_t grid_x, grid_y, threads;
  CUstream stream;
  int64_t shared_bytes = 0, cluster = 1;
  bool dependent = false;
};

// A kernel on one GPU.
class Kernel {
 public:
  Kernel(std::string name, int device, CUcontext context, CUfunction function);
  void launch(const Launch& how, const Arguments& arguments) const;

 private:
  void permit(int64_t shared_bytes, int64_t cluster) const;

  std::string name_;
  int device_;
  CUcontext context_;
  CUfunction function_;
  int64_t static_shared_ = 0;
  mutable std::atomic<int64_t> most_shared_, most_cluster_;  // what needs no permission any more
};

// A kernel, ready to be launched on a GPU. `name` is a literal. Throws std::runtime_error if the library has none for
// that GPU, or the driver refuses it.
const Kernel& load(Key key, const char* name, const Device& device);

// The compute capabilities that the library has kernels for, as "80,90".
std::string architectures();
// The weight types that it has kernels for on some GPU, as `"q6_k", "q4_k"`.
std::string formats();

}  // namespace q6k

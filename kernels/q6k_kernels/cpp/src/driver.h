// libcuda, looked for when it is first needed; so the library loads, and its CPU side works, where there is none.
//
// What it takes of cuda.h is declared here and in abi.h, under cuda.h's names: building needs no CUDA toolkit. Tests
// have a driver compiled against the real one write down what it is handed.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

#include "abi.h"
#include "plans.h"

namespace q6k {

using CUresult = int;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;

struct CUlaunchAttribute {
  int id;
  union alignas(8) {
    char pad[64];
    struct {
      unsigned int x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } value;
};

struct CUlaunchConfig {
  unsigned int gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute* attrs;
  unsigned int numAttrs;
};

struct alignas(128) CUtensorMap {
  unsigned char opaque[128];
};

// The functions of libcuda that are used here: name of the symbol, and what it takes.
#define Q6K_DRIVER_FUNCTIONS(X)                                                                                      \
  X(cuInit, unsigned int)                                                                                            \
  X(cuDriverGetVersion, int*)                                                                                        \
  X(cuGetErrorName, CUresult, const char**)                                                                          \
  X(cuGetErrorString, CUresult, const char**)                                                                        \
  X(cuDeviceGet, int*, int)                                                                                          \
  X(cuDeviceGetAttribute, int*, int, int)                                                                            \
  X(cuDevicePrimaryCtxRetain, CUcontext*, int)                                                                       \
  X(cuCtxGetCurrent, CUcontext*)                                                                                     \
  X(cuCtxPushCurrent_v2, CUcontext)                                                                                  \
  X(cuCtxPopCurrent_v2, CUcontext*)                                                                                  \
  X(cuThreadExchangeStreamCaptureMode, int*)                                                                         \
  X(cuLibraryLoadData, CUlibrary*, const void*, int*, void**, unsigned int, int*, void**, unsigned int)              \
  X(cuLibraryGetKernel, CUkernel*, CUlibrary, const char*)                                                           \
  X(cuKernelGetFunction, CUfunction*, CUkernel)                                                                      \
  X(cuFuncGetAttribute, int*, int, CUfunction)                                                                       \
  X(cuFuncSetAttribute, CUfunction, int, int)                                                                        \
  X(cuLaunchKernelEx, const CUlaunchConfig*, CUfunction, void**, void**)                                             \
  X(cuTensorMapEncodeTiled, CUtensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,   \
    const uint32_t*, int, int, int, int)

struct Driver {
#define Q6K_MEMBER(name, ...) CUresult (*name)(__VA_ARGS__) = nullptr;
  Q6K_DRIVER_FUNCTIONS(Q6K_MEMBER)
#undef Q6K_MEMBER
  int version = 0;  // the newest CUDA version it supports, 13000 for 13.0
};

// Whether a code is one of a set, of ERRORS_OF_IMAGES say.
template <size_t COUNT>
bool is_one_of(CUresult code, const int (&set)[COUNT]) {
  return std::find(std::begin(set), std::end(set), code) != std::end(set);
}

// The driver, initialised. Throws std::runtime_error if there is none, it is too old or finds no GPU.
const Driver& driver();

// Throws std::runtime_error with the driver's words unless `code`, returned by `function` for `what`, is success.
void check(CUresult code, const char* function, const std::string& what = "");

// What torch calls that GPU. Looked up once, then from a table.
const Device& device_of(int index);

// The context that torch uses on a GPU, made if need be and kept until the process ends.
CUcontext primary_context(int index);

// Makes a context the calling thread's, and the one before again at the end.
class Current {
 public:
  explicit Current(CUcontext context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

// Lets the calling thread load code while it, or another, captures a CUDA graph.
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace q6k

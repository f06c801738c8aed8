// libcuda, looked for when it is first needed; so the library loads, and its CPU side works, where there is none.
#pragma once
#include <cuda.h>

#include <string>

#include "plans.h"

namespace q6k {

// The functions of libcuda that are used here.
#define Q6K_DRIVER_FUNCTIONS(X)                                                                                   \
  X(cuInit) X(cuDriverGetVersion) X(cuGetErrorName) X(cuGetErrorString) X(cuDeviceGet) X(cuDeviceGetAttribute)      \
  X(cuDevicePrimaryCtxRetain) X(cuCtxGetCurrent) X(cuCtxPushCurrent) X(cuCtxPopCurrent)                             \
  X(cuThreadExchangeStreamCaptureMode) X(cuLibraryLoadData) X(cuLibraryGetKernel) X(cuKernelGetFunction)            \
  X(cuFuncGetAttribute) X(cuFuncSetAttribute) X(cuLaunchKernelEx) X(cuTensorMapEncodeTiled)

struct Driver {
#define Q6K_MEMBER(name) decltype(&::name) name = nullptr;
  Q6K_DRIVER_FUNCTIONS(Q6K_MEMBER)
#undef Q6K_MEMBER
  int version = 0;  // the newest CUDA version it supports, 13000 for 13.0
};

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
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace q6k

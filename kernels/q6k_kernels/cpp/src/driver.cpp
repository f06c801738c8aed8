#include "driver.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>

namespace q6k {
namespace {

constexpr const char* UPDATE =
    ". Install NVIDIA's driver 525 or later (CUDA 12.0); `nvidia-smi` shows which one is there.";
constexpr int OLDEST = 12000;
constexpr int MOST_DEVICES = 64;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Driver load() {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    throw std::runtime_error(std::string("the NVIDIA driver does not load: ") + dlerror() + UPDATE);
  }
  Driver found;
#define Q6K_FIND(name, ...)                                                                                   \
  found.name = reinterpret_cast<CUresult (*)(__VA_ARGS__)>(dlsym(library, #name));                             \
  if (!found.name) throw std::runtime_error(std::string("the NVIDIA driver is too old: it has no " #name) + UPDATE);
  Q6K_DRIVER_FUNCTIONS(Q6K_FIND)
#undef Q6K_FIND
  return found;
}

const Driver& loaded() {
  static const Driver found = load();  // thrown, it is tried again
  return found;
}

Driver initialised() {
  Driver found = loaded();
  check(found.cuDriverGetVersion(&found.version), "cuDriverGetVersion");
  if (found.version < OLDEST) {
    throw std::runtime_error("the NVIDIA driver is too old: it supports CUDA " + version_text(found.version) +
                             ", needed is " + version_text(OLDEST) + UPDATE);
  }
  const CUresult code = found.cuInit(0);
  if (code == CUDA_ERROR_NO_DEVICE) {
    throw std::runtime_error("the NVIDIA driver finds no GPU. Run where `nvidia-smi` lists one.");
  }
  check(code, "cuInit");
  return found;
}

int64_t attribute(int index, int which) {
  int handle, value;
  const std::string what = "GPU " + std::to_string(index);
  check(driver().cuDeviceGet(&handle, index), "cuDeviceGet", what);
  check(driver().cuDeviceGetAttribute(&value, which, handle), "cuDeviceGetAttribute", what);
  return value;
}

// What is made once for each GPU, by its ordinal; reading it takes no lock.
template <typename T>
struct PerDevice {
  std::array<std::atomic<T*>, MOST_DEVICES> made = {};
  std::mutex making;

  template <typename Make>
  const T& get(int index, Make make) {
    if (index < 0 || index >= MOST_DEVICES) {
      throw std::runtime_error("expected a GPU of ordinal 0 to " + std::to_string(MOST_DEVICES - 1) + ", found " +
                               std::to_string(index));
    }
    auto& place = made[static_cast<size_t>(index)];
    if (const T* known = place.load(std::memory_order_acquire)) return *known;
    const std::lock_guard<std::mutex> lock(making);
    if (const T* known = place.load(std::memory_order_acquire)) return *known;
    T* const value = new T(make());  // kept until the process ends
    place.store(value, std::memory_order_release);
    return *value;
  }
};

}  // namespace

const Driver& driver() {
  static const Driver found = initialised();
  return found;
}

void check(CUresult code, const char* function, const std::string& what) {
  if (code == CUDA_SUCCESS) return;
  const char *name = nullptr, *words = nullptr;
  loaded().cuGetErrorName(code, &name);
  loaded().cuGetErrorString(code, &words);
  std::ostringstream text;
  text << function << (what.empty() ? "" : " for ") << what << " failed: " << (name ? name : "CUresult") << " ("
       << code << "), " << (words ? words : "unknown to this driver") << ". ";
  if (is_one_of(code, ERRORS_OF_EARLIER_KERNELS)) {
    text << "A kernel launched earlier failed, ours or another; restart the process, and set CUDA_LAUNCH_BLOCKING=1 "
            "to see which.";
  } else {
    text << "`q6k-convert doctor` says what works on this machine.";
  }
  throw std::runtime_error(text.str());
}

const Device& device_of(int index) {
  static PerDevice<Device> devices;
  return devices.get(index, [index]() {
    return Device{index,
                  attribute(index, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) * 10 +
                      attribute(index, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
                  attribute(index, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
                  attribute(index, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
                  attribute(index, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)};
  });
}

CUcontext primary_context(int index) {
  static PerDevice<CUcontext> contexts;
  return contexts.get(index, [index]() {
    int handle;
    CUcontext context = nullptr;
    const std::string what = "GPU " + std::to_string(index);
    check(driver().cuDeviceGet(&handle, index), "cuDeviceGet", what);
    check(driver().cuDevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain", what);
    return context;
  });
}

Current::Current(CUcontext context) { check(driver().cuCtxPushCurrent_v2(context), "cuCtxPushCurrent"); }

Current::~Current() {
  CUcontext popped;
  driver().cuCtxPopCurrent_v2(&popped);  // fails only after a kernel has, which the next call reports
}

RelaxedCapture::RelaxedCapture() {
  check(driver().cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode");
}

RelaxedCapture::~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }

}  // namespace q6k

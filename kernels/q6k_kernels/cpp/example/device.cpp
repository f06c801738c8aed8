#include "device.h"

#include <ATen/Context.h>
#include <dlfcn.h>
#include <torch/version.h>

#include <filesystem>

#include "failure.h"

namespace q6k {
namespace {

constexpr const char* BUILD = ". Build it with `q6k-convert build-ops`.";
constexpr const char* EXPORT_HERE = ". Export it again, here: `q6k-convert export BUNDLE MODEL.pt2`.";

// Attributes of libcuda's cuDeviceGetAttribute; its header comes with the toolkit, which is not needed here.
constexpr int CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76;

Capability capability_of(int index) {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  const auto find = [library](const char* name) { return library ? dlsym(library, name) : nullptr; };
  const auto start = reinterpret_cast<int (*)(unsigned)>(find("cuInit"));
  const auto get = reinterpret_cast<int (*)(int*, int)>(find("cuDeviceGet"));
  const auto attribute = reinterpret_cast<int (*)(int*, int, int)>(find("cuDeviceGetAttribute"));
  Capability found;
  int handle = 0;
  if (!start || !get || !attribute || start(0) || get(&handle, index) ||
      attribute(&found.major, CAPABILITY_MAJOR, handle) || attribute(&found.minor, CAPABILITY_MINOR, handle)) {
    throw Failure(Exit::MISSING,
                  "the NVIDIA driver does not say what GPU " + std::to_string(index) +
                      " is. `nvidia-smi` should list it; `q6k-convert doctor` says what works on this machine.");
  }
  return found;
}

std::string minor_version(const std::string& version) {
  return version.substr(0, version.find('.', version.find('.') + 1));
}

}  // namespace

void load_operations(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) {
    throw Failure(Exit::MISSING, path + ": no such file, expected the library of the operations" + BUILD);
  }
  // A name without a slash would be looked for elsewhere.
  const std::string file = std::filesystem::absolute(path, ignored).string();
  void* const library = dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!library) throw Failure(Exit::MISSING, path + ": does not load: " + dlerror() + BUILD);
  if (!dlsym(library, "q6k_ops_about")) {
    throw Failure(Exit::MISSING, path + ": loads, but is not a library of these operations" + BUILD);
  }
}

c10::Device device_of(const Package& package) {
  const Info& info = package.info;
  if (minor_version(info.torch) != minor_version(TORCH_VERSION)) {
    throw Failure(Exit::MISSING, package.path + ": compiled by torch " + quoted(info.torch) + ", and this is " +
                                     TORCH_VERSION + EXPORT_HERE);
  }
  if (!info.capability) return c10::kCPU;
  if (!at::hasCUDA()) {
    throw Failure(Exit::MISSING, package.path + ": compiled for a GPU, and torch sees none" + EXPORT_HERE);
  }
  const Capability found = capability_of(0);
  if (found.major != info.capability->major || found.minor != info.capability->minor) {
    throw Failure(Exit::MISSING, package.path + ": compiled for compute capability " +
                                     capability_text(*info.capability) + ", GPU 0 has " + capability_text(found) +
                                     EXPORT_HERE);
  }
  return {c10::kCUDA, 0};
}

}  // namespace q6k

#include "kernels.h"

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "about.h"

namespace q6k {
namespace {

extern "C" const unsigned char q6k_cubins[];  // cubins.S

struct Cubin {
  int64_t arch;
  struct {
    uint16_t file, count, values[MOST_VALUES];
  } key;
  size_t offset, bytes;  // in q6k_cubins
};

#include "cubins.inc"

constexpr int64_t SHARED_BYTES = 48 << 10;  // of a block, static and dynamic, that need no permission
constexpr int64_t PORTABLE_CLUSTER = 8;     // the largest that every GPU with clusters can run

std::string capability_text(int64_t arch) { return std::to_string(arch / 10) + "." + std::to_string(arch % 10); }

// The code that runs on a GPU: its own, else the newest of its major version that is not newer. Hopper's is its own
// alone, as it has instructions that no other GPU has.
const Cubin* find_cubin(const Key& key, int64_t arch) {
  const Cubin* best = nullptr;
  for (const Cubin& each : CUBINS) {
    const bool runs = each.arch == arch || (each.arch / 10 == arch / 10 && each.arch < arch && each.arch != 90);
    static_assert(sizeof each.key == sizeof key, "the same layout");
    if (runs && std::memcmp(&each.key, &key, sizeof key) == 0 && (!best || each.arch > best->arch)) best = &each;
  }
  return best;
}

// Whether the key is one of the weight type's kernels.
bool is_of(const WeightType& type, uint16_t file, const uint16_t* values) {
  return file != QUANTIZE_ROWS && std::equal(std::begin(type.macros), std::end(type.macros), values);
}

bool has_format(const WeightType& type) {
  return std::any_of(std::begin(CUBINS), std::end(CUBINS),
                     [&](const Cubin& each) { return is_of(type, each.key.file, each.key.values); });
}

[[noreturn]] void refuse(const Key& key, const char* name, int64_t arch) {
  for (const WeightType& type : WEIGHT_TYPES) {
    if (!is_of(type, key.file, key.values) || has_format(type)) continue;
    const std::string format = type.name;
    throw std::runtime_error("this library has no kernels of " + format + "; it was built for " + formats() +
                             ". Build it for this weight type, too: `q6k-convert build-ops --format " + format +
                             "`, with --format for each that is needed, or without for all.");
  }
  std::string macros;
  for (int i = 0; i < key.count; ++i) macros += (i ? ", " : "") + std::to_string(key.values[i]);
  throw std::runtime_error(std::string("this library has no kernel ") + name + " (" + macros +
                           ") for compute capability " + capability_text(arch) + "; it was built for " +
                           architectures() + ". Build it for this GPU: `q6k-convert build-ops --arch " +
                           std::to_string(arch) + "`.");
}

CUlibrary load_library(const Cubin& cubin) {
  CUlibrary library;
  const CUresult code = driver().cuLibraryLoadData(&library, q6k_cubins + cubin.offset, nullptr, nullptr, 0, nullptr,
                                                   nullptr, 0);
  if (is_one_of(code, ERRORS_OF_IMAGES)) {
    throw std::runtime_error(
        "cuLibraryLoadData failed (" + std::to_string(code) +
        "): the library's kernels were compiled by NVRTC " Q6K_NVRTC ", and the driver supports CUDA " +
        std::to_string(driver().version / 1000) + "." + std::to_string(driver().version % 1000 / 10) +
        ". Update the driver, or build the library again with an NVRTC that is no newer than it.");
  }
  check(code, "cuLibraryLoadData");
  return library;
}

// Loads under one lock: it happens once for each kernel and GPU.
struct Loaded {
  std::mutex lock;
  std::map<const Cubin*, CUlibrary> libraries;
  std::deque<Kernel> kernels;  // which stay where they are
  std::map<std::pair<std::pair<const Cubin*, std::string>, int>, const Kernel*> known;
};

Loaded& loaded() {
  static Loaded* const one = new Loaded;  // never destroyed: other threads may launch while the process ends
  return *one;
}

const Kernel& load_now(const Key& key, const char* name, const Device& device) {
  const Cubin* const cubin = find_cubin(key, device.arch);
  if (!cubin) refuse(key, name, device.arch);
  Loaded& all = loaded();
  const std::lock_guard<std::mutex> lock(all.lock);
  const auto place = std::make_pair(std::make_pair(cubin, std::string(name)), device.index);
  if (const auto found = all.known.find(place); found != all.known.end()) return *found->second;
  const CUcontext context = primary_context(device.index);
  const RelaxedCapture relaxed;
  const Current current(context);
  auto library = all.libraries.find(cubin);
  if (library == all.libraries.end()) library = all.libraries.emplace(cubin, load_library(*cubin)).first;
  CUkernel kernel;
  CUfunction function;
  check(driver().cuLibraryGetKernel(&kernel, library->second, name), "cuLibraryGetKernel", name);
  // This brings the code to the GPU: left to the first launch, it would happen in a graph's capture.
  check(driver().cuKernelGetFunction(&function, kernel), "cuKernelGetFunction", name);
  const Kernel& made = all.kernels.emplace_back(name, device.index, context, function);
  all.known[place] = &made;
  return made;
}

// What this thread has launched before, by the hash of the key: found without a lock.
struct Recent {
  Key key;
  const char* name = nullptr;
  int device = -1;
  const Kernel* kernel = nullptr;
};
constexpr size_t RECENT = 256;
thread_local std::array<Recent, RECENT> recent;

size_t hash_of(const Key& key, int device) {
  uint64_t words[(sizeof key + 7) / 8] = {}, mixed = static_cast<uint64_t>(device);
  std::memcpy(words, &key, sizeof key);
  for (const uint64_t word : words) mixed = (mixed ^ word) * 0x9E3779B97F4A7C15u;
  return static_cast<size_t>(mixed >> 40) % RECENT;
}

}  // namespace

const Kernel& load(Key key, const char* name, const Device& device) {
  Recent& place = recent[hash_of(key, device.index)];
  if (place.kernel && place.name == name && place.device == device.index && place.key == key) return *place.kernel;
  const Kernel& kernel = load_now(key, name, device);
  place = {key, name, device.index, &kernel};
  return kernel;
}

std::string architectures() {
  std::set<int64_t> all;
  for (const Cubin& each : CUBINS) all.insert(each.arch);
  std::string text;
  for (const int64_t arch : all) text += (text.empty() ? "" : ",") + std::to_string(arch);
  return text;
}

std::string formats() {
  std::string text;
  for (const WeightType& type : WEIGHT_TYPES) {
    if (has_format(type)) text += (text.empty() ? "\"" : ", \"") + std::string(type.name) + "\"";
  }
  return text;
}

Kernel::Kernel(std::string name, int device, CUcontext context, CUfunction function)
    : name_(std::move(name)), device_(device), context_(context), function_(function), most_cluster_(PORTABLE_CLUSTER) {
  int shared;
  check(driver().cuFuncGetAttribute(&shared, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function_), "cuFuncGetAttribute",
        name_);
  static_shared_ = shared;
  most_shared_ = SHARED_BYTES - static_shared_;
}

void Kernel::launch(const Launch& how, const Arguments& arguments) const {
  if (how.shared_bytes > most_shared_.load(std::memory_order_acquire) ||
      how.cluster > most_cluster_.load(std::memory_order_acquire)) {
    permit(how.shared_bytes, how.cluster);
  }
  CUlaunchAttribute attributes[2] = {};
  unsigned int count = 0;
  if (how.cluster > 1) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attributes[count++].value.clusterDim = {static_cast<unsigned int>(how.cluster), 1, 1};
  }
  if (how.dependent) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[count++].value.programmaticStreamSerializationAllowed = 1;
  }
  CUlaunchConfig config = {};
  config.gridDimX = static_cast<unsigned int>(how.grid_x);
  config.gridDimY = static_cast<unsigned int>(how.grid_y);
  config.blockDimX = static_cast<unsigned int>(how.threads);
  config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned int>(how.shared_bytes);
  config.hStream = how.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  size_t size = arguments.size();
  const auto mark = [](uintptr_t value) { return reinterpret_cast<void*>(value); };
  void* extra[] = {mark(CU_LAUNCH_PARAM_BUFFER_POINTER), const_cast<unsigned char*>(arguments.data()),
                   mark(CU_LAUNCH_PARAM_BUFFER_SIZE), &size, mark(CU_LAUNCH_PARAM_END)};
  const Driver& functions = driver();
  CUcontext current = nullptr;
  CUresult code = functions.cuCtxGetCurrent(&current);
  if (code == CUDA_SUCCESS && current == context_) {
    code = functions.cuLaunchKernelEx(&config, function_, nullptr, extra);
  } else {  // a thread that has not used CUDA yet, or one that is at another GPU
    const Current at(context_);
    code = functions.cuLaunchKernelEx(&config, function_, nullptr, extra);
  }
  if (code != CUDA_SUCCESS) {
    check(code, "cuLaunchKernelEx",
          name_ + " on GPU " + std::to_string(device_) + " (grid (" + std::to_string(how.grid_x) + ", " +
              std::to_string(how.grid_y) + ", 1), " + std::to_string(how.threads) + " threads, " +
              std::to_string(how.shared_bytes) + " bytes of dynamic shared memory, clusters of " +
              std::to_string(how.cluster) + ")");
  }
}

void Kernel::permit(int64_t shared_bytes, int64_t cluster) const {
  const std::lock_guard<std::mutex> lock(loaded().lock);
  const RelaxedCapture relaxed;
  const Current current(context_);
  const auto set = [&](int which, int64_t value, const char* what) {
    check(driver().cuFuncSetAttribute(function_, which, static_cast<int>(value)), "cuFuncSetAttribute",
          std::string(what) + " of " + name_ + " to " + std::to_string(value));
  };
  if (shared_bytes > most_shared_) {
    // All there is, at once: the limit belongs to the function, which others may hold, too.
    const int64_t most = std::max(shared_bytes, device_of(device_).shared_bytes - static_shared_);
    set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most, "dynamic shared memory");
    most_shared_.store(most, std::memory_order_release);
  }
  if (cluster > most_cluster_) {
    set(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, "clusters of more than 8");
    most_cluster_.store(cluster, std::memory_order_release);
  }
}

}  // namespace q6k

// A stand-in for libcuda, compiled against NVIDIA's own cuda.h: it runs nothing, keeps the driver's rules that
// matter here, and writes down what it was asked in its own reading of the structures.
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEVICES 8
#define PARAMETER 16  // bytes of the parameter of a kernel that has one
struct function {
  int device, most_shared, any_cluster;
};

static char record[1 << 20];
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int driver_version = 13000, devices = 1, capability = 90, static_shared = 0, launch_us = 0, cooperates = 1;
static char failing[64];
static int failure;
static __thread CUcontext stack[16];
static __thread int depth;
static __thread CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

// ---- for the tests

void fake_reset(int version, int count, int cc, int shared) {
  used = 0, record[0] = 0, failing[0] = 0, depth = 0, launch_us = 0, cooperates = 1;
  driver_version = version, devices = count, capability = cc, static_shared = shared;
}
void fake_fail(const char* name, int code) { snprintf(failing, sizeof failing, "%s", name), failure = code; }
void fake_cooperates(int can) { cooperates = can; }
void fake_slow(int microseconds) { launch_us = microseconds; }
const char* fake_record(void) { return record; }
int fake_depth(void) { return depth; }
int fake_mode(void) { return mode; }

static void note(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  pthread_mutex_lock(&lock);
  used += vsnprintf(record + used, sizeof record - used, format, arguments);
  if (used >= sizeof record) abort();
  pthread_mutex_unlock(&lock);
  va_end(arguments);
}
#define BEGIN() \
  if (!strcmp(failing, __func__)) return (CUresult)failure
#define CONTEXT(device) ((CUcontext)(uintptr_t)(0x1000 + (device)))
static CUcontext top(void) { return depth ? stack[depth - 1] : NULL; }

// ---- the driver

// Names come without the suffix of a version, of which the newest is meant.
CUresult CUDAAPI cuGetProcAddress(const char* name, void** address, int version, cuuint64_t flags,
                                  CUdriverProcAddressQueryResult* status) {
  char newest[128];
  Dl_info here;
  if (!dladdr((void*)fake_reset, &here)) abort();
  void* const self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  snprintf(newest, sizeof newest, "%s_v2", name);
  *address = dlsym(self, newest);
  if (!*address) *address = dlsym(self, name);
  dlclose(self);
  if (status) *status = *address ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *address ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
// NVRTC looks for the driver's private tables, and does without.
CUresult CUDAAPI cuGetExportTable(const void** table, const CUuuid* name) {
  return *table = NULL, CUDA_ERROR_NOT_FOUND;
}
CUresult CUDAAPI cuInit(unsigned int flags) {
  BEGIN();
  return flags ? CUDA_ERROR_INVALID_VALUE : devices ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}
CUresult CUDAAPI cuDriverGetVersion(int* version) {
  BEGIN();
  return *version = driver_version, CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorName(CUresult code, const char** name) {
  *name = code == CUDA_ERROR_NO_DEVICE          ? "CUDA_ERROR_NO_DEVICE"
          : code == CUDA_ERROR_INVALID_VALUE    ? "CUDA_ERROR_INVALID_VALUE"
          : code == CUDA_ERROR_LAUNCH_FAILED    ? "CUDA_ERROR_LAUNCH_FAILED"
          : code == CUDA_ERROR_NO_BINARY_FOR_GPU ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
                                                : NULL;
  return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuGetErrorString(CUresult code, const char** text) {
  const char* name;
  *text = cuGetErrorName(code, &name) ? NULL : "some words about it";
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuDeviceGetCount(int* count) {
  BEGIN();
  return *count = devices, CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  BEGIN();
  if (ordinal < 0 || ordinal >= devices) return CUDA_ERROR_INVALID_DEVICE;
  return *device = ordinal, CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetName(char* name, int length, CUdevice device) {
  BEGIN();
  return snprintf(name, length, "Fake GPU %d", device), CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  BEGIN();
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? capability / 10
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? capability % 10
           : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT     ? 132 + device
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 << 10
           : attribute == CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH       ? cooperates
                                                                       : -1;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceTotalMem(size_t* bytes, CUdevice device) {
  BEGIN();
  return *bytes = 80ull << 30, CUDA_SUCCESS;
}
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  BEGIN();
  note("retain %d\n", device);
  return *context = CONTEXT(device), CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
  BEGIN();
  return *context = top(), CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
  BEGIN();
  return stack[depth++] = context, CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxPopCurrent(CUcontext* context) {
  BEGIN();
  if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
  return *context = stack[--depth], CUDA_SUCCESS;
}
CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* exchanged) {
  BEGIN();
  CUstreamCaptureMode before = mode;
  mode = *exchanged, *exchanged = before;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* options, void** values,
                                   unsigned int count, CUlibraryOption* library_options, void** library_values,
                                   unsigned int library_count) {
  BEGIN();
  if (memcmp(code, "\177ELF", 4) || count || library_count) return CUDA_ERROR_INVALID_IMAGE;
  note("library mode=%d\n", mode);
  // Names are looked up in a copy, as the caller's memory may be gone: long enough for the tests' small cubins.
  char* copy = malloc(2048);
  memcpy(copy, code, 2048);
  return *library = (CUlibrary)copy, CUDA_SUCCESS;
}
CUresult CUDAAPI cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  BEGIN();
  char section[256];
  snprintf(section, sizeof section, ".text.%s", name);
  if (!memmem(library, 2048, section, strlen(section) + 1)) return CUDA_ERROR_NOT_FOUND;
  return *kernel = (CUkernel)library, CUDA_SUCCESS;
}
CUresult CUDAAPI cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  BEGIN();
  if (!top()) return CUDA_ERROR_INVALID_CONTEXT;
  struct function* made = calloc(1, sizeof *made);
  made->device = (int)((uintptr_t)top() - 0x1000);
  note("function device=%d mode=%d\n", made->device, mode);
  return *function = (CUfunction)made, CUDA_SUCCESS;
}
CUresult CUDAAPI cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  BEGIN();
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 77
           : attribute == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES  ? 16
           : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES ? static_shared
                                                              : -1;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  BEGIN();
  struct function* function = (struct function*)handle;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > 227 << 10) return CUDA_ERROR_INVALID_VALUE;
    function->most_shared = value;
  } else if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) {
    function->any_cluster = value;
  } else {
    return CUDA_ERROR_INVALID_VALUE;
  }
  note("set %s=%d device=%d\n", attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? "shared" : "cluster",
       value, function->device);
  return CUDA_SUCCESS;
}
// Blocks on a multiprocessor of 2048 threads and 228 KB of shared memory, of which a block takes 1 KB for itself.
static int resident(const struct function* function, int threads, int dynamic) {
  const int most = function->most_shared ? function->most_shared : (48 << 10) - static_shared;
  const int by_threads = 2048 / threads, by_shared = (228 << 10) / (dynamic + static_shared + 1024);
  return dynamic > most ? 0 : by_threads < by_shared ? by_threads : by_shared;
}
CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int threads,
                                                             size_t dynamic) {
  BEGIN();
  const struct function* function = (struct function*)handle;
  if (top() != CONTEXT(function->device)) return CUDA_ERROR_INVALID_CONTEXT;
  return *blocks = resident(function, threads, (int)dynamic), CUDA_SUCCESS;
}
CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters, void** extra) {
  BEGIN();
  if (launch_us) usleep(launch_us);
  const struct function* function = (struct function*)handle;
  if (top() != CONTEXT(function->device)) return CUDA_ERROR_INVALID_CONTEXT;
  // Static and dynamic shared memory up to 48 KiB, unless more dynamic was permitted.
  const int dynamic = (int)config->sharedMemBytes, most = function->most_shared;
  if (most ? dynamic > most : dynamic + static_shared > 48 << 10) return CUDA_ERROR_INVALID_VALUE;
  if (parameters ? extra != NULL
                 : extra[0] != CU_LAUNCH_PARAM_BUFFER_POINTER || extra[2] != CU_LAUNCH_PARAM_BUFFER_SIZE ||
                       extra[4] != CU_LAUNCH_PARAM_END)
    return CUDA_ERROR_INVALID_VALUE;
  char attributes[256] = "", bytes[1024] = "";
  for (unsigned int i = 0, at = 0; i < config->numAttrs; i++) {
    const CUlaunchAttribute* a = &config->attrs[i];
    if (a->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      if (config->gridDimX % a->value.clusterDim.x) return CUDA_ERROR_INVALID_VALUE;
      if (a->value.clusterDim.x > 8 && !function->any_cluster) return CUDA_ERROR_INVALID_VALUE;
      at += snprintf(attributes + at, sizeof attributes - at, " cluster=%u,%u,%u", a->value.clusterDim.x,
                     a->value.clusterDim.y, a->value.clusterDim.z);
    } else if (a->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      at += snprintf(attributes + at, sizeof attributes - at, " dependent=%d",
                     a->value.programmaticStreamSerializationAllowed);
    } else if (a->id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) {
      const int room = resident(function, (int)config->blockDimX, dynamic) * (132 + function->device);
      const unsigned int blocks = config->gridDimX * config->gridDimY * config->gridDimZ;
      if (!cooperates) return CUDA_ERROR_NOT_SUPPORTED;
      if (!parameters) return CUDA_ERROR_INVALID_VALUE;  // in a graph a GPU's driver does not take them packed
      if (blocks > (unsigned int)room) return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
      at += snprintf(attributes + at, sizeof attributes - at, " cooperative=%d", a->value.cooperative);
    } else {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  const unsigned char* buffer = parameters ? parameters[0] : extra[1];
  const size_t size = parameters ? PARAMETER : *(const size_t*)extra[3];
  for (size_t i = 0; i < size && i < 500; i++) sprintf(bytes + 2 * i, "%02x", buffer[i]);
  note("launch device=%d grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%zu%s arguments=%s\n", function->device,
       config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
       config->blockDimZ, config->sharedMemBytes, (size_t)(uintptr_t)config->hStream, attributes, bytes);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType dtype, cuuint32_t rank, void* address,
                                        const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                        const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                        CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                        CUtensorMapFloatOOBfill fill) {
  BEGIN();
  if ((uintptr_t)map % _Alignof(CUtensorMap) || rank < 2 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return CUDA_ERROR_INVALID_VALUE;
  const char* name = dtype == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16  ? "bf16"
                     : dtype == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? "fp16"
                     : dtype == CU_TENSOR_MAP_DATA_TYPE_UINT32  ? "uint32"
                                                                : "?";
  const int line = swizzle == CU_TENSOR_MAP_SWIZZLE_128B   ? 128
                   : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                   : swizzle == CU_TENSOR_MAP_SWIZZLE_32B  ? 32
                   : swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0
                                                           : -1;
  char lists[4][128] = {""};  // dims, strides, box, steps
  for (cuuint32_t i = 0; i < rank; i++) {
    const size_t values[4] = {dims[i], i + 1 < rank ? strides[i] : 0, box[i], steps[i]};
    for (int list = 0; list < 4; list++) {
      if (list == 1 && i + 1 == rank) continue;
      char* const to = lists[list];
      snprintf(to + strlen(to), sizeof lists[list] - strlen(to), "%s%zu", i ? "," : "", values[list]);
    }
  }
  note("map %s at %zu dims=%s stride=%s box=%s steps=%s swizzle=%d l2=%d zeros=%d\n", name,
       (size_t)(uintptr_t)address, lists[0], lists[1], lists[2], lists[3], line,
       promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_256B, fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  for (size_t i = 0; i < sizeof map->opaque / sizeof *map->opaque; i++) map->opaque[i] = i;
  return CUDA_SUCCESS;
}

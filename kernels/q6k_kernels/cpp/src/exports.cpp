// What the library tells without torch: who it is, and its plans and launches, for tests to hold against Python's.
#include <cstdio>
#include <cstring>
#include <exception>

#include "about.h"
#include "gpu.h"
#include "launches.h"

#define Q6K_EXPORT extern "C" __attribute__((visibility("default")))

using namespace q6k;

namespace {

// Memory handed out from one place, as tests of Python's launches do it: aligned to 512 bytes, one after the other.
class Arena final : public Scratch {
 public:
  explicit Arena(char* at) : at_(at) {}
  void* take(int64_t bytes) override {
    void* const taken = at_;
    at_ += ceil_div(bytes, 512) * 512;
    return taken;
  }

 private:
  char* at_;
};

Device device(const int64_t* d) { return {static_cast<int>(d[0]), d[1], d[2], d[3], d[4]}; }

}  // namespace

// {"version": ..., "nvrtc": ..., "architectures": [...], "formats": [...]}
Q6K_EXPORT const char* q6k_ops_about() {
  static const std::string text =
      "{\"version\": \"" Q6K_VERSION "\", \"nvrtc\": \"" Q6K_NVRTC "\", \"architectures\": [" + architectures() + "], \"formats\": [" + formats() +
      "]}";
  return text.c_str();
}

// `d`: index, arch, multiprocessors, shared bytes of a block and of a multiprocessor. Returns whether there is a plan.
Q6K_EXPORT int q6k_ops_plan_decode(int64_t m, int64_t n, int64_t k, const char* format, const int64_t* d, int64_t out[9]) {
  const auto plan = plan_decode(m, n, k, weight_type(format), device(d));
  if (plan) std::memcpy(out, &*plan, sizeof *plan);
  return plan.has_value();
}

Q6K_EXPORT void q6k_ops_plan_wgmma(int64_t m, int64_t n, int64_t k, const char* format, const int64_t* d,
                                   int64_t out[13]) {
  const WgmmaPlan plan = plan_wgmma(m, n, k, device(d));
  const WgmmaConfig& config = *plan.config;
  const WeightType& type = weight_type(format);
  const int64_t values[13] = {config.tokens,
                              config.consumers,
                              config.stages[type.index],
                              config.x_stages,
                              config.occupancy,
                              config.cycles,
                              plan.token_blocks,
                              plan.row_blocks,
                              plan.blocks,
                              plan.whole,
                              plan.scratch_floats(),
                              plan.scratch_flags(),
                              config.shared_bytes[type.index]};
  std::memcpy(out, values, sizeof values);
}

Q6K_EXPORT void q6k_ops_plan_mma(int64_t m, int64_t n, int64_t k, const char* format, const int64_t* d, int64_t out[6]) {
  const MmaPlan plan = plan_mma(m, n, k, weight_type(format), device(d));
  std::memcpy(out, &plan, sizeof plan);
}

Q6K_EXPORT int64_t q6k_ops_slice_rows(int64_t m, int64_t k) { return slice_rows(m, k); }

// 0 as planned, 1 gemm_mma, 2 expanding for cuBLAS: for tests on a GPU that would not take them.
Q6K_EXPORT void q6k_ops_force_gemm(int which) { force_gemm(static_cast<Gemm>(which)); }

// One product on given memory, by `kind` 0 decode, 1 wgmma, 2 mma; `d` as for plans; `numbers`: m, n, k, stride,
// row_tiles, bias_kind, fp16; `pointers`: x, tiles, bias, y, stream, arena. Returns 0, or 1 with what was wrong
// in `error`.
Q6K_EXPORT int q6k_ops_launch(int kind, const char* format, const int64_t* d, const int64_t numbers[7], void* const pointers[6],
                              uint64_t ticket, char* error, size_t room) {
  try {
    const Device on = device(d);
    const Product product = {pointers[0], pointers[1], pointers[2], pointers[3],
                             numbers[0],  numbers[1],  numbers[2],  numbers[3],
                             numbers[4],  static_cast<int>(numbers[5]),
                             &weight_type(format), numbers[6] != 0, &on, static_cast<CUstream>(pointers[4])};
    Arena arena(static_cast<char*>(pointers[5]));
    set_ticket(ticket);
    (kind == 0 ? launch_decode : kind == 1 ? launch_wgmma : launch_mma)(product, arena);
    return 0;
  } catch (const std::exception& caught) {
    std::snprintf(error, room, "%s", caught.what());
    return 1;
  }
}

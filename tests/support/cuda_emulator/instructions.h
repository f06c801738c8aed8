// The PTX instructions that csrc/ uses, named as in the text with underscores; what they do is in the PTX ISA.
// `translate` turns asm statements into calls of these; one that is missing does not compile.
#pragma once

#include "barriers.h"
#include "cuda_cpp.h"

// ---- conversions -------------------------------------------------------------------------------------------

static inline float emulated_bf16(uint32_t bits) { return bits_as<float>(bits << 16); }

static inline uint32_t to_emulated_bf16(float value) {  // to nearest even
  const uint32_t bits = bits_as<uint32_t>(value);
  if (std::isnan(value)) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// bf16 of a sum or product known in fp64: to nearest even once, whatever fp32 would have made of it.
static inline uint32_t to_emulated_bf16(double value) {
  if (std::isnan(value)) return 0x7FFF;
  if (value == 0 || std::isinf(value)) return to_emulated_bf16((float)value);
  int exponent;
  frexp(value, &exponent);
  const double unit = ldexp(1.0, (exponent - 1 < -126 ? -126 : exponent - 1) - 7);
  return to_emulated_bf16((float)(nearbyint(value / unit) * unit));
}

static inline float emulated_fp16(uint32_t bits) {
  const int sign = bits >> 15 & 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value;
  if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else {
    value = exponent ? ldexpf((float)(1024 + fraction), exponent - 25) : ldexpf((float)fraction, -24);
  }
  return sign ? -value : value;
}

static inline uint32_t to_emulated_fp16(float value) {  // to nearest even
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = fabs((double)value);
  if (magnitude >= 65520) return sign | 0x7C00;
  if (magnitude == 0) return sign;
  int exponent;
  frexp(magnitude, &exponent);
  const int scale = (exponent - 1 < -14 ? -14 : exponent - 1) - 10;
  const uint32_t steps = (uint32_t)nearbyint(ldexp(magnitude, -scale));  // up to 2048: a carry raises the exponent
  return sign | (steps + ((uint32_t)(scale + 24) << 10));
}

static inline void cvt_f32_f16(float& d, uint16_t a) { d = emulated_fp16(a); }
static inline void cvt_rn_f16x2_f32(uint32_t& d, float a, float b) {
  d = to_emulated_fp16(a) << 16 | to_emulated_fp16(b);
}
static inline void cvt_rn_bf16x2_f32(uint32_t& d, float a, float b) {
  d = to_emulated_bf16(a) << 16 | to_emulated_bf16(b);
}
static inline void sub_f16x2(uint32_t& d, uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int half = 0; half < 32; half += 16) {
    result |= to_emulated_fp16(emulated_fp16(a >> half & 0xFFFF) - emulated_fp16(b >> half & 0xFFFF)) << half;
  }
  d = result;
}
static inline void fma_rn_bf16x2(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int half = 0; half < 32; half += 16) {
    // 8 + 8 bits, and a sum within fp64 where kernels use it
    const double product = (double)emulated_bf16(a >> half & 0xFFFF) * emulated_bf16(b >> half & 0xFFFF);
    result |= to_emulated_bf16(product + (double)emulated_bf16(c >> half & 0xFFFF)) << half;
  }
  d = result;
}

static inline void max_NaN_f32(float& d, float a, float b) {
  d = std::isnan(a) || std::isnan(b) ? bits_as<float>(0x7FFFFFFFu) : fmaxf(a, b);
}

// ---- bytes -------------------------------------------------------------------------------------------------

static inline void prmt_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t selector) {
  d = emulated_permutation(a, b, selector);
}
static inline void dp2a_lo_s32_s32(int& d, uint32_t a, int b, int c) {
  d = c + (int16_t)a * (int8_t)b + (int16_t)(a >> 16) * (int8_t)((uint32_t)b >> 8);
}

// ---- shared memory and copies ------------------------------------------------------------------------------

template <typename T>
static inline T& emulated_shared_at(uint32_t address) {
  return *reinterpret_cast<T*>(emulator::from_shared_address(address, sizeof(T)));
}
static inline void ld_shared_v4_u32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t address) {
  const uint4 v = emulated_shared_at<uint4>(address);
  a = v.x, b = v.y, c = v.z, d = v.w;
}
static inline void ld_shared_v2_u32(uint32_t& a, uint32_t& b, uint32_t address) {
  const uint2 v = emulated_shared_at<uint2>(address);
  a = v.x, b = v.y;
}
static inline void ld_shared_u32(uint32_t& a, uint32_t address) { a = emulated_shared_at<uint32_t>(address); }
static inline void ld_shared_u16(uint16_t& a, uint32_t address) { a = emulated_shared_at<uint16_t>(address); }
static inline void ld_shared_f32(float& a, uint32_t address) { a = emulated_shared_at<float>(address); }
static inline void st_shared_f32(uint32_t address, float a) { emulated_shared_at<float>(address) = a; }
static inline void st_shared_u32(uint32_t address, uint32_t a) { emulated_shared_at<uint32_t>(address) = a; }
static inline void st_shared_v4_u32(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  emulated_shared_at<uint4>(address) = {a, b, c, d};
}

static inline void cp_async_cg_shared_global(uint32_t to, const void* from, int bytes) {
  if ((uintptr_t)from % bytes) emulator::fail("misaligned asynchronous copy");
  uint8_t* const at = emulator::from_shared_address(to, bytes);
  if (emulator::copies_at_once) {
    memcpy(at, from, bytes);
  } else {
    emulator::current->copies.push_back({at, from, bytes, false});
  }
}
static inline void cp_async_cg_shared_global(uint32_t to, const void* from, int bytes, int present) {
  static const uint8_t zeros[16] = {};
  if (present && present != bytes) emulator::fail("an asynchronous copy of a part");
  cp_async_cg_shared_global(to, present ? from : zeros, bytes);
}
// How long lines are kept is not told here: a policy is only a number to be handed on.
static inline void createpolicy_fractional_L2_evict_first_b64(unsigned long long& policy, double) {
  policy = emulator::EVICT_FIRST;
}
static inline void cp_async_cg_shared_global_L2_cache_hint(uint32_t to, const void* from, int bytes,
                                                           unsigned long long policy) {
  if (policy != emulator::EVICT_FIRST) emulator::fail("a cache policy that no instruction made");
  cp_async_cg_shared_global(to, from, bytes);
}
static inline void cp_async_commit_group() { emulator::current->copies.push_back({nullptr, nullptr, 0, true}); }
static inline void cp_async_wait_group(int pending) {
  auto& copies = emulator::current->copies;
  int groups = 0;
  for (const auto& copy : copies) groups += copy.commits;
  size_t at = 0;
  for (; groups > pending; ++at) {
    if (copies[at].commits) {
      --groups;
    } else {
      memcpy(copies[at].to, copies[at].from, copies[at].bytes);
    }
  }
  copies.erase(copies.begin(), copies.begin() + at);
}

// ---- global memory that blocks share ------------------------------------------------------------------------

template <typename T>
static inline void ld_global_cg_u64(T& value, const T* from) {
  static_assert(sizeof(T) == 8, "64 bits");
  value = *from;
}
static inline void ld_global_cg_f32(float& value, const float* from) { value = *from; }
static inline void ld_global_cg_v2_f32(float& one, float& two, const float* from) {
  if ((uintptr_t)from % 8) emulator::fail("misaligned load of two");
  one = from[0], two = from[1];
}
static inline void atom_acq_rel_gpu_global_add_u32(uint32_t& before, uint32_t* at, uint32_t by) {
  emulator::wrote = true;
  before = *at;
  *at += by;
}

// What blocks that run side by side tell each other. A store is seen at once. A vector is never seen in
// part here; PTX promises that of each element alone.
template <typename Word>
static inline Word emulated_poll(const void* from) {
  if ((uintptr_t)from % sizeof(Word)) emulator::fail("misaligned load of what another block writes");
  emulator::look();
  Word word;
  memcpy(&word, from, sizeof word);
  return word;
}
template <typename Word>
static inline void emulated_tell(void* to, Word word) {
  if ((uintptr_t)to % sizeof word) emulator::fail("misaligned store of what another block reads");
  emulator::wrote = true;
  memcpy(to, &word, sizeof word);
}
static inline void ld_relaxed_gpu_global_u64(unsigned long long& a, const void* from) {
  a = emulated_poll<unsigned long long>(from);
}
static inline void ld_relaxed_gpu_global_v4_u32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                                const void* from) {
  const uint4 v = emulated_poll<uint4>(from);
  a = v.x, b = v.y, c = v.z, d = v.w;
}
static inline void st_relaxed_gpu_global_u32(void* to, uint32_t a) { emulated_tell(to, a); }
static inline void st_relaxed_gpu_global_u64(void* to, unsigned long long a) { emulated_tell(to, a); }
static inline void nanosleep_u32(uint32_t) { emulator::give_way(); }
static inline void mov_u64(unsigned long long& d, unsigned long long a) { d = a; }
static inline unsigned long long emulated_globaltimer() {  // of a clock that whoever looks at it winds
  static unsigned long long time;
  return ++time;
}

// ---- clusters and launches ---------------------------------------------------------------------------------

static inline uint32_t emulated_cluster_ctarank() {
  emulator::need_cluster();
  return emulator::current->block->rank;
}
static inline uint32_t emulated_cluster_nctarank() {
  emulator::need_cluster();
  return emulator::blocks.size();
}
static inline void mov_u32(uint32_t& d, uint32_t a) { d = a; }
static inline void mapa_shared_cluster_u32(uint32_t& d, uint32_t address, uint32_t rank) {
  d = emulator::to_remote_address(address, rank);
}
static inline void ld_shared_cluster_f32(float& d, uint32_t address) { d = emulated_shared_at<float>(address); }
static inline void redux_sync_max_u32(uint32_t& result, uint32_t value, uint32_t mask) {
  result = emulated_reduction("redux.sync.max", value, mask, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
static inline void redux_sync_min_u32(uint32_t& result, uint32_t value, uint32_t mask) {
  result = emulated_reduction("redux.sync.min", value, mask, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}
static inline void barrier_cluster_arrive_aligned() {
  emulator::need_cluster();
  emulator::current->cluster_phase = emulator::cluster.generation;
  emulator::arrive(emulator::cluster);
}
static inline void barrier_cluster_wait_aligned() {
  const uint64_t& generation = emulator::cluster.generation;
  if (generation == emulator::current->cluster_phase) emulator::wait_for(generation);
}
// Grids run one after another.
static inline void griddepcontrol_launch_dependents() {}
static inline void griddepcontrol_wait() {}

// ---- matrices ----------------------------------------------------------------------------------------------

// Lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix row l / 4, elements 2(l % 4) and
// the next.
static inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                                            uint32_t address) {
  struct Operand { uint32_t address, result[4]; } operand{address, {}};
  emulator::together("ldmatrix", operand, [](Operand** all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const uint8_t* row = emulator::from_shared_address(all[8 * matrix + lane / 4]->address, 16);
        memcpy(&all[lane]->result[matrix], row + lane % 4 * 4, 4);
      }
    }
  });
  a = operand.result[0], b = operand.result[1], c = operand.result[2], d = operand.result[3];
}

// As above, but of the transposed matrices.
static inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                                                  uint32_t address) {
  struct Operand { uint32_t address, result[4]; } operand{address, {}};
  emulator::together("ldmatrix.trans", operand, [](Operand** all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const uint8_t* row = emulator::from_shared_address(all[8 * matrix + lane % 4 * 2 + i]->address, 16);
          memcpy(&pair[i], row + lane / 4 * 2, 2);
        }
        all[lane]->result[matrix] = pair[0] | (uint32_t)pair[1] << 16;
      }
    }
  });
  a = operand.result[0], b = operand.result[1], c = operand.result[2], d = operand.result[3];
}
static inline void movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& d, uint32_t a) {
  struct Operand { uint32_t value, result; } operand{a, 0};
  emulator::together("movmatrix.trans", operand, [](Operand** all) {
    for (int lane = 0; lane < 32; ++lane) {
      all[lane]->result = 0;
      for (int i = 0; i < 2; ++i) {  // element (row, column) comes from (column, row)
        const int row = lane % 4 * 2 + i, column = lane / 4;
        const uint32_t pair = all[row * 4 + column / 2]->value;
        all[lane]->result |= (pair >> 16 * (column % 2) & 0xFFFF) << 16 * i;
      }
    }
  });
  d = operand.result;
}
static inline void ex2_approx_ftz_f32(float& d, float a) { d = exp2f(a); }

// Matrix units cut off what does not fit in fp32 instead of rounding it: the worst that is allowed.
static inline float toward_zero(double value) {
  const float nearest = (float)value;
  return fabs((double)nearest) > fabs(value) ? nextafterf(nearest, 0.0f) : nearest;
}

template <typename Value>
static inline void emulated_mma_16bit(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1,
                                      uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                                      float c2, float c3, Value value) {
  struct Operand { uint32_t a[4], b[2]; float c[4]; } operand{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  emulator::together("mma.m16n8k16 of 16 bits", operand, [&](Operand** all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r) {
          a[g + 8 * (r & 1)][2 * t + half + 8 * (r >> 1)] = value(all[lane]->a[r] >> 16 * half & 0xFFFF);
        }
        for (int r = 0; r < 2; ++r) b[2 * t + half + 8 * r][g] = value(all[lane]->b[r] >> 16 * half & 0xFFFF);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + 8 * (r >> 1), column = lane % 4 * 2 + (r & 1);
        double sum = all[lane]->c[r];
        for (int k = 0; k < 16; ++k) sum += (double)a[row][k] * b[k][column];
        all[lane]->c[r] = toward_zero(sum);
      }
    }
  });
  d0 = operand.c[0], d1 = operand.c[1], d2 = operand.c[2], d3 = operand.c[3];
}
static inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1, float c0, float c1, float c2, float c3) {
  emulated_mma_16bit(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, emulated_bf16);
}
static inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1, float c0, float c1, float c2, float c3) {
  emulated_mma_16bit(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, emulated_fp16);
}

// Eight columns: the first half of a product of sixteen.
static inline void mma_sync_aligned_m16n8k8_row_col_f32_bf16_bf16_f32(float& d0, float& d1, float& d2, float& d3,
                                                                      uint32_t a0, uint32_t a1, uint32_t b0, float c0,
                                                                      float c1, float c2, float c3) {
  emulated_mma_16bit(d0, d1, d2, d3, a0, a1, 0, 0, b0, 0, c0, c1, c2, c3, emulated_bf16);
}

// A product of K columns, operand A of type `A`: register r of it has row g + 8(r & 1), columns 16(r >> 1) + 4t on.
template <typename A, int K>
static inline void emulated_mma_8bit(uint32_t (&c)[4], const uint32_t (&a)[K / 8], const uint32_t (&b)[K / 16]) {
  struct Operand { const uint32_t *a, *b; uint32_t* c; } operand{a, b, c};
  emulator::together("mma of 8 bits", operand, [](Operand** all) {
    int left[16][K], right[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int byte = 0; byte < 4; ++byte) {
        for (int r = 0; r < K / 8; ++r) {
          left[g + 8 * (r & 1)][16 * (r >> 1) + 4 * t + byte] = (A)(all[lane]->a[r] >> 8 * byte);
        }
        for (int r = 0; r < K / 16; ++r) right[16 * r + 4 * t + byte][g] = (int8_t)(all[lane]->b[r] >> 8 * byte);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        uint32_t sum = all[lane]->c[r];
        for (int k = 0; k < K; ++k) sum += (uint32_t)(left[lane / 4 + 8 * (r >> 1)][k] * right[k][lane % 4 * 2 + (r & 1)]);
        all[lane]->c[r] = sum;
      }
    }
  });
}
#define EMULATED_MMA_8BIT(type, A)                                                                                  \
  static inline void mma_sync_aligned_m16n8k16_row_col_s32_##type##_s8_s32(                                        \
      uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t a0, uint32_t a1, uint32_t b0, uint32_t c0,  \
      uint32_t c1, uint32_t c2, uint32_t c3) {                                                                     \
    uint32_t c[4] = {c0, c1, c2, c3};                                                                              \
    emulated_mma_8bit<A, 16>(c, {a0, a1}, {b0});                                                                   \
    d0 = c[0], d1 = c[1], d2 = c[2], d3 = c[3];                                                                    \
  }                                                                                                                \
  static inline void mma_sync_aligned_m16n8k32_row_col_s32_##type##_s8_s32(                                        \
      uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,  \
      uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {                              \
    uint32_t c[4] = {c0, c1, c2, c3};                                                                              \
    emulated_mma_8bit<A, 32>(c, {a0, a1, a2, a3}, {b0, b1});                                                       \
    d0 = c[0], d1 = c[1], d2 = c[2], d3 = c[3];                                                                    \
  }
EMULATED_MMA_8BIT(s8, int8_t)
EMULATED_MMA_8BIT(u8, uint8_t)

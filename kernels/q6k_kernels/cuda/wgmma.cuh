// The instructions of Hopper (sm_90a) for gemm_wgmma.cuh, which follows in the same unit.
//
//   Q6K_TOKENS  tokens of a block's output, columns of the matrix instruction: 16, 32, 64, 128 or 256

#ifndef Q6K_TOKENS
#define Q6K_TOKENS 64
#endif

constexpr int TOKENS = Q6K_TOKENS;
constexpr int SUMS = TOKENS / 2;  // fp32 sums of a thread

// Rows that a tile's copy is made of: as few as have at most 256 words, and pieces of 16 bytes.
__device__ constexpr int tile_pieces() {
  int pieces = (TILE_BYTES + 1023) / 1024;
  while (TILE_BYTES % (16 * pieces)) ++pieces;
  return pieces;
}
constexpr int TILE_PIECES = tile_pieces();

struct __align__(64) TensorMap {
  u64 words[16];
};

// ---- copies ------------------------------------------------------------------------------------------------

// A box of x from (row, column) on.
__device__ __forceinline__ void copy_tokens(u32 to_shared, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to_shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The tiles of a super-block from row tile `first` on. A tile is TILE_PIECES rows of the map: a box is no wider.
__device__ __forceinline__ void copy_tiles(u32 to_shared, const TensorMap* map, int block, int first, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          to_shared),
      "l"(map), "r"(0), "r"(block * TILE_PIECES), "r"(first), "r"(barrier)
      : "memory");
}

// A place in a ring of `stages`: which stage, and the parity of the barrier's phase.
struct RingPlace {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- matrix instruction ------------------------------------------------------------------------------------

#if Q6K_FP16
#define Q6K_TYPES "f32.f16.f16"
#else
#define Q6K_TYPES "f32.bf16.bf16"
#endif
#define Q6K_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define Q6K_D32(i) Q6K_D8(i), Q6K_D8(i + 8), Q6K_D8(i + 16), Q6K_D8(i + 24)
#define Q6K_MULTIPLY(n, numbers, a0, a1, a2, a3, b, ...)                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16." Q6K_TYPES " {" numbers "}, {%" #a0 ", %" #a1 \
               ", %" #a2 ", %" #a3 "}, %" #b ", 1, 1, 1, 0;"                                            \
               : __VA_ARGS__                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x))
#define Q6K_N8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define Q6K_N16 Q6K_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define Q6K_N32 \
  Q6K_N16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define Q6K_N64                                                                                                 \
  Q6K_N32                                                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define Q6K_N128                                                                                                \
  Q6K_N64                                                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "   \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "      \
  "%122, %123, %124, %125, %126, %127"

// d += a (64 rows x 16, this lane's fragment) times x (TOKENS x 16, described). Asynchronous.
__device__ __forceinline__ void multiply(float (&d)[SUMS], const u32 (&a)[4], u64 x) {
#if Q6K_TOKENS == 16
  Q6K_MULTIPLY(16, Q6K_N8, 8, 9, 10, 11, 12, Q6K_D8(0));
#elif Q6K_TOKENS == 32
  Q6K_MULTIPLY(32, Q6K_N16, 16, 17, 18, 19, 20, Q6K_D8(0), Q6K_D8(8));
#elif Q6K_TOKENS == 64
  Q6K_MULTIPLY(64, Q6K_N32, 32, 33, 34, 35, 36, Q6K_D32(0));
#elif Q6K_TOKENS == 128
  Q6K_MULTIPLY(128, Q6K_N64, 64, 65, 66, 67, 68, Q6K_D32(0), Q6K_D32(32));
#else
  Q6K_MULTIPLY(256, Q6K_N128, 128, 129, 130, 131, 132, Q6K_D32(0), Q6K_D32(32), Q6K_D32(64), Q6K_D32(96));
#endif
}

// A (TOKENS x 64) stage of x as the instruction reads it: K-major, 128-byte swizzle, 8 rows every 1024 bytes.
__device__ __forceinline__ u64 describe(u32 stage) {
  return (u64)((stage & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void multiplies_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiplies_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the last PENDING groups of products are done.
template <int PENDING>
__device__ __forceinline__ void multiplies_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// ---- words that blocks leave for each other in global memory -------------------------------------------------

// A thread that awaits the flag sees what this thread wrote before, and what other lanes wrote before they met it.
__device__ __forceinline__ void raise_flag(u64* flag, u64 value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ __forceinline__ void await_flag(const u64* flag, u64 value) {
  u64 found;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
  } while (found != value);
}

__device__ __forceinline__ void clear_flag(u64* flag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(0ull) : "memory");
}

__device__ __forceinline__ float4 load_of_block(const float* from) {  // from the L2 cache, which blocks share
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

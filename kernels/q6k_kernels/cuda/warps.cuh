// Blocks of the decode kernels, and sums of row tiles that fall to several of their warps.
//
//   Q6K_WARPS    warps of a block
//   Q6K_STAGES   tiles of a warp's ring
//   Q6K_OCCUPANCY  blocks that must fit on a multiprocessor

#ifndef Q6K_WARPS
#define Q6K_WARPS 8
#endif
#ifndef Q6K_STAGES
#define Q6K_STAGES 3
#endif
#ifndef Q6K_OCCUPANCY
#define Q6K_OCCUPANCY 2
#endif

constexpr int WARPS = Q6K_WARPS;
constexpr int STAGES = Q6K_STAGES;
constexpr int THREADS = WARPS * 32;
constexpr int RING_BYTES = WARPS * STAGES * TILE_BYTES;

__device__ __forceinline__ float load_float(u32 address) { return __uint_as_float(load_shared_4(address)); }

// Start of a part of `total`; hosts ensure that the product is below 2^31.
__device__ __forceinline__ int share(int total, int part, int parts) { return (u32)(total * part) / (u32)parts; }

// Adds the values of warps w, w + 1, ... for one output, up to the warp whose tiles begin at `end` or after. Each
// warp's value lies `pitch` bytes after the previous one. Four loads are in flight at a time.
__device__ __forceinline__ float sum_of_warps(u32 values, int pitch, int total, int w, int end) {
  float sum = 0.0f;
  for (; w < WARPS && share(total, w, WARPS) < end; w += 4) {
    float parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int begin = share(total, w + i, WARPS);
      const bool some = w + i < WARPS && begin < end && begin < share(total, w + i + 1, WARPS);
      parts[i] = some ? load_float(values + (w + i) * pitch) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += parts[i];
  }
  return sum;
}

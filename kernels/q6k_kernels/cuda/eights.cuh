// Eight 16-bit values of a thread, loaded and stored at once, and sums over a block.

__device__ __forceinline__ uint4 load_raw(const u16* from) { return *reinterpret_cast<const uint4*>(from); }

__device__ __forceinline__ void to_floats(uint4 raw, float (&values)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const u32 word = word_of(raw, j);
    values[2 * j] = half_to_float(word & 0xFFFFu);
    values[2 * j + 1] = half_to_float(word >> 16);
  }
}

__device__ __forceinline__ void load_8(const u16* from, float (&values)[8]) { to_floats(load_raw(from), values); }

__device__ __forceinline__ void store_8(u16* to, const float (&values)[8]) {
  u32 words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) words[j] = pack_halves(values[2 * j], values[2 * j + 1]);
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ void load_factors(const float* from, float (&factors)[8]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float4 four = reinterpret_cast<const float4*>(from)[j];
    factors[4 * j] = four.x, factors[4 * j + 1] = four.y, factors[4 * j + 2] = four.z, factors[4 * j + 3] = four.w;
  }
}

// Over all threads of a block, in one order. `parts` is for this sum alone.
template <int THREADS>
__device__ __forceinline__ float sum_of_block(float value, float* parts) {
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, apart);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) sum += parts[w];
  return sum;
}

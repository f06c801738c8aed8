// The next token: the best logit, or the best of logit / temperature + noise (`sampling` has the formulas).
//
// What a thread has seen is one number, the score in an order that integers have, then the token, smaller ones first.
// The last block to be done writes the token where the next step reads it.

constexpr int THREADS = 256;

// A bijection of 32-bit numbers, every bit of which depends on every other.
__device__ __forceinline__ u32 mixed(u32 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

__device__ __forceinline__ float gumbel_noise(u32 token, u32 key) {
  const float bits = (float)mixed(mixed(token ^ key) + key);
  const float uniform = fminf((bits + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  return -logf(-log1pf(-uniform));
}

// Parameters: logits 16-bit (vocabulary,); position, of the last token; token, the next, also put at chosen[position +
// 1]; best and counter, 0 between launches; seed; softcap of logits, or 0: none; temperature, or 0: no noise.
extern "C" __global__ void __launch_bounds__(THREADS)
    q6k_choose(const u16* logits, i64* position, i64* token, i64* chosen, u64* best, u32* counter, const i64* seed,
               float softcap, float temperature, int vocabulary) {
  wait_for_previous_grid();
  const i64 following = *position + 1;
  const u32 key = mixed(mixed((u32)*seed + 0x9E3779B9u) ^ (u32)following);
  u64 most = 0;
  for (int at = blockIdx.x * THREADS + threadIdx.x; at < vocabulary; at += gridDim.x * THREADS) {
    float score = half_to_float(logits[at]);
    if (temperature > 0.0f) {
      if (softcap != 0.0f) score = softcap * tanhf(score / softcap);
      score = score / temperature + gumbel_noise(at, key);
    }
    if (score != score) continue;  // not a number
    const u32 bits = __float_as_uint(score + 0.0f);  // -0 is 0
    const u32 order = bits >> 31 ? ~bits : bits | 0x80000000u;
    most = max(most, (u64)order << 32 | (0xFFFFFFFFu - at));
  }
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, apart));
  if ((threadIdx.x & 31) == 0) atomicMax(best, most);
  __threadfence();
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(counter, 1u) != gridDim.x - 1) return;
  __threadfence();
  const u64 found = atomicExch(best, 0);
  *counter = 0;
  // Where no logit is a number, a token all the same, within bounds.
  const i64 next = found ? 0xFFFFFFFFu - (u32)found : vocabulary - 1;
  *token = next;
  chosen[following] = next;
  *position = following;
}

// The choice of the next token: the best logit, or the best of logit / temperature + noise (`generate.sampling` has the
// formulas).
//
// A thread keeps its best candidate as one integer: the score, mapped to integers of the same order, then the token,
// smaller ones first. The last block to finish compares the candidates of all blocks, and writes the token where the
// next step reads it. Nearly all of the time is spent waiting for memory: for the logits, the counter, and the
// candidates of other blocks.

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int VALUES = 8;         // that a thread reads at once, 16 bytes
constexpr int MOST_BLOCKS = 256;  // 262,144 tokens before threads take a second turn
constexpr u32 NO_NUMBERS = 0x7FFF7FFFu;

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

__device__ __forceinline__ u64 load_of_others(const u64* from) {  // past the cache of this multiprocessor
  u64 value;
  asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ u64 ranked(float score, u32 token) {
  if (score != score) return 0;  // not a number
  const u32 bits = __float_as_uint(score + 0.0f);  // -0 is 0
  const u32 order = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (u64)order << 32 | (0xFFFFFFFFu - token);
}

template <int LANES>
__device__ __forceinline__ u64 best_of(u64 most) {  // best of a warp's first LANES, returned in each of them
#pragma unroll
  for (int apart = LANES / 2; apart; apart >>= 1) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, apart));
  return most;
}

// Two 16-bit values, those whose flag is 1 replaced by what is no number. The flags are bytes, 0 or 1.
__device__ __forceinline__ u32 suppress(u32 pair, u32 flags) {
  return pair | ((flags & 1u) | (flags & 0x100u) << 8) * (NO_NUMBERS & 0xFFFFu);
}

// What one token is chosen by; see the kernels.
struct Choice {
  const u16* logits;
  i64 *position, *token, *chosen;
  u64* bests;
  u32* counter;
  const i64* seed;
  const u8* suppressed;
  float softcap, temperature;
  u32 size;
};

// `advance`: from the position of the last token to that of the next.
__device__ __forceinline__ void choose(const Choice& c, i64 advance) {
  __shared__ u64 of_warps[WARPS];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, size = c.size;
  // No multiprocessor's cache may keep the position: the next step reads it before its wait (attend.cuh).
  const i64 following = (i64)load_of_others((const u64*)c.position) + advance;
  u64 most = 0;
  for (u32 first = (blockIdx.x * THREADS + threadIdx.x) * VALUES; first < size; first += gridDim.x * THREADS * VALUES) {
    uint4 raw;
    if (first + VALUES <= size) {
      raw = *(const uint4*)(c.logits + first);
    } else {
      u32 pairs[VALUES / 2];
#pragma unroll
      for (u32 i = 0; i < VALUES / 2; ++i) {
        pairs[i] = NO_NUMBERS;
        if (first + 2 * i < size) pairs[i] = (pairs[i] & 0xFFFF0000u) | c.logits[first + 2 * i];
        if (first + 2 * i + 1 < size) pairs[i] = (pairs[i] & 0xFFFFu) | (u32)c.logits[first + 2 * i + 1] << 16;
      }
      raw = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    if (c.suppressed != nullptr) {
      const uint2 flags = *(const uint2*)(c.suppressed + first);
      raw = make_uint4(suppress(raw.x, flags.x), suppress(raw.y, flags.x >> 16), suppress(raw.z, flags.y),
                       suppress(raw.w, flags.y >> 16));
    }
    if (c.temperature > 0.0f) {
      const u32 key = mixed(mixed((u32)*c.seed + 0x9E3779B9u) ^ (u32)following);
#pragma unroll 1  // not eight times the logarithms' code: it comes from memory once a step
      for (u32 i = 0; i < VALUES; ++i) {
        float score = half_to_float(raw.x & 0xFFFFu);
        raw = make_uint4(raw.x >> 16 | raw.y << 16, raw.y >> 16 | raw.z << 16, raw.z >> 16 | raw.w << 16, raw.w >> 16);
        if (c.softcap != 0.0f) score = c.softcap * tanhf(score / c.softcap);
        most = max(most, ranked(score / c.temperature + gumbel_noise(first + i, key), first + i));
      }
    } else {
#pragma unroll
      for (u32 i = 0; i < VALUES; ++i) {
        most = max(most, ranked(half_to_float(word_of(raw, i / 2) >> 16 * (i & 1) & 0xFFFFu), first + i));
      }
    }
  }
  most = best_of<32>(most);
  if (lane == 0) of_warps[warp] = most;
  __syncthreads();
  if (warp != 0) return;
  most = best_of<WARPS>(of_warps[lane % WARPS]);
  u32 before = 0;
  if (lane == 0) {
    c.bests[blockIdx.x] = most;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(c.counter) : "memory");
  }
  if (__shfl_sync(0xFFFFFFFFu, before, 0) != gridDim.x - 1) return;
  __syncwarp();
  u64 found[MOST_BLOCKS / 32];
#pragma unroll
  for (u32 i = 0; i < MOST_BLOCKS / 32; ++i) {  // all at once
    const u32 block = i * 32 + lane;
    found[i] = block < gridDim.x ? load_of_others(c.bests + block) : 0;
  }
  most = 0;
#pragma unroll
  for (u32 i = 0; i < MOST_BLOCKS / 32; ++i) most = max(most, found[i]);
  most = best_of<32>(most);
  if (lane != 0) return;
  // If no logit is a number, the token must still be within bounds.
  const i64 next = most ? 0xFFFFFFFFu - (u32)most : size - 1;
  *c.counter = 0;  // for the next launch
  *c.token = next;
  c.chosen[following] = next;
  *c.position = following;
}

// Parameters: logits 16-bit (vocabulary,), aligned to 16 bytes; position of the last token; token, the next one, also
// written to chosen[position + 1]; bests (MOST_BLOCKS,); counter, 0 between launches; seed; suppressed, a byte for each
// token and more up to a multiple of 8, 1 for those that must not be chosen, or null; softcap of logits, 0 for none;
// temperature, 0 for no noise. Grid: at most MOST_BLOCKS.
extern "C" __global__ void __launch_bounds__(THREADS)
    q6k_choose(const u16* logits, i64* position, i64* token, i64* chosen, u64* bests, u32* counter, const i64* seed,
               const u8* suppressed, float softcap, float temperature, int vocabulary) {
  let_dependents_start();
  wait_for_previous_grid();
  choose({logits, position, token, chosen, bests, counter, seed, suppressed, softcap, temperature, (u32)vocabulary}, 1);
}

// The same for several texts, text i in places[i], all different. By text: logits (texts, vocabulary), a multiple of 8;
// bests, counters. By place: advances, 1, or 0 for a place whose position stays; position, token, chosen, `positions`
// apart; seed; suppressed, up to a multiple of 8 apart, or null; temperature, or null for no noise.
// Grid: at most MOST_BLOCKS x texts.
extern "C" __global__ void __launch_bounds__(THREADS)
    q6k_choose_of_texts(const u16* logits, const i64* places, const i64* advances, i64* position, i64* token,
                        i64* chosen, u64* bests, u32* counters, const i64* seed, const u8* suppressed,
                        const float* temperature, i64 positions, float softcap, int vocabulary) {
  const i64 text = blockIdx.y, place = places[text];
  let_dependents_start();
  wait_for_previous_grid();
  choose({logits + text * vocabulary, position + place, token + place, chosen + place * positions,
          bests + text * MOST_BLOCKS, counters + text, seed + place,
          suppressed == nullptr ? nullptr : suppressed + place * vocabulary, softcap,
          temperature == nullptr ? 0.0f : temperature[place], (u32)vocabulary},
         advances[place]);
}

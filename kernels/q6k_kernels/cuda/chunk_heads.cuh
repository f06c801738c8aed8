// Heads of a chunk of a prompt, before attention: norms, rotary embedding, and the place of keys and values in memory.
// fours.cuh and codes.cuh come before this file.
//
//   Q6K_HEAD_DIM  values of a head, a multiple of 32 up to 512
//   Q6K_CODES     1: the cache holds codes

#ifndef Q6K_HEAD_DIM
#define Q6K_HEAD_DIM 128
#endif
#ifndef Q6K_CODES
#define Q6K_CODES 0
#endif

constexpr int DIM = Q6K_HEAD_DIM;
constexpr int WARPS = 8;
constexpr int TOGETHER = 2;               // vectors that a warp loads at once
constexpr int PARTS = (DIM + 127) / 128;  // a lane has 4 values of each 128

// Four values, or two, each for two neighbours.
__device__ __forceinline__ void load_4(const float* from, float (&values)[4], bool twice = false) {
  if (twice) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    values[0] = values[1] = two.x, values[2] = values[3] = two.y;
  } else {
    const float4 four = *reinterpret_cast<const float4*>(from);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  }
}

// A warp's: the root mean square norm of a vector, with weights or without.
__device__ __forceinline__ void norm(uint2 (&raw)[PARTS], const float* weight, float epsilon) {
  const int lane = threadIdx.x & 31;
  float squares = 0.0f, found[4], factors[4] = {};
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    to_floats(raw[i], found);
#pragma unroll
    for (int j = 0; j < 4; ++j) squares = fmaf(found[j], found[j], squares);
  }
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, apart);
  const float inverse = rsqrtf(squares / DIM + epsilon);
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const int d = 4 * lane + 128 * i;
    to_floats(raw[i], found);
    if (weight != nullptr && d < DIM) load_4(weight + d, factors);
#pragma unroll
    for (int j = 0; j < 4; ++j) found[j] = found[j] * inverse * (weight == nullptr ? 1.0f : factors[j]);
    raw[i] = to_halves(found);
  }
}

// A warp's: mixes a vector, see codes.cuh.
__device__ __forceinline__ void mix(uint2 (&raw)[PARTS]) {
  constexpr int TOGETHER = mixed_values(DIM);
  float found[PARTS][4];
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    to_floats(raw[i], found[i]);
#pragma unroll
    for (int apart = 1; apart < 4; apart <<= 1) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j & apart) continue;
        const float one = found[i][j], other = found[i][j + apart];
        found[i][j] = one + other, found[i][j + apart] = one - other;
      }
    }
#pragma unroll
    for (int apart = 1; apart < TOGETHER / 4 && apart < 32; apart <<= 1) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, found[i][j], apart);
        found[i][j] = threadIdx.x & apart ? other - found[i][j] : found[i][j] + other;
      }
    }
  }
#pragma unroll
  for (int apart = 1; apart < TOGETHER / 128; apart <<= 1) {
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      if (i & apart) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float one = found[i][j], other = found[i + apart][j];
        found[i][j] = one + other, found[i + apart][j] = one - other;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) found[i][j] *= mixing_factor(TOGETHER);
    raw[i] = to_halves(found[i]);
  }
}

// A warp's: codes of a vector go to `codes`, their scale to `scale`; the vector becomes what they stand for.
__device__ __forceinline__ void code(uint2 (&raw)[PARTS], s8* codes, float* scale, bool stores) {
  const int lane = threadIdx.x & 31;
  float found[PARTS][4], largest = 0.0f;
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    to_floats(raw[i], found[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) largest = largest_or_nan(largest, fabsf(found[i][j]));
  }
  const Coding coding(largest);
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const int d = 4 * lane + 128 * i;
    u32 four = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const s8 each = coding.code(found[i][j]);
      four |= (u32)(u8)each << 8 * j;
      found[i][j] = (float)each * coding.scale;
    }
    raw[i] = to_halves(found[i]);
    if (stores && d < DIM) *reinterpret_cast<u32*>(codes + d) = four;
  }
  if (stores && lane == 0) *scale = coding.scale;
}

// Where vectors go: that of a head and a row to head / group * of_group + slot * of_row + head % group * DIM. The slot is
// start + row, in a ring of `slots` that modulo `slots`; rows before `first_row` go nowhere.
struct Place {
  u16* to;
  i64 of_group, of_row;
  int group, first_row, start, slots;

  __device__ __forceinline__ bool takes(int row) const { return to != nullptr && row >= first_row; }

  __device__ __forceinline__ i64 slot_of(int row) const { return slots ? (start + row) % slots : start + row; }

  __device__ __forceinline__ void store(int head, int row, int d, uint2 four) const {
    if (!takes(row)) return;
    const i64 at = slot_of(row);
    *reinterpret_cast<uint2*>(to + head / group * of_group + at * of_row + head % group * DIM + d) = four;
  }
};

// Parameters: q, k and v of the rows, 16-bit (count or key heads, DIM), rows `q_stride`, `k_stride` and `v_stride` apart,
// k and v null if there are none; queries, 16-bit, in which a row is `of_row` and a head of keys with its queries
// `of_group` values from the next; keys and values, the cache (key heads, slots, DIM), a ring, 16-bit, or codes with
// key_scales and value_scales, fp32 (key heads, slots), else null; more_keys and
// more_values, (key heads, more_slots, DIM), to which all keys and values also go, from slot more_first on, or null;
// cosines and sines fp32 (positions, rotated / 2); q_norm, k_norm fp32 (DIM,), or null; growth fp32 (positions,),
// factors of queries, or null; the norms' epsilon; start, the position of the first row; count; key heads; slots;
// more_slots; more_first; whether v has a norm, without weights; rotated, the first values of a head, which rotate, a
// multiple of 8; query_size, DIM, or more if something follows each query; whether neighbours rotate, rather than the
// halves of what rotates; whether q and k rotate before their norms. Grid: rows x (WARPS * TOGETHER) vectors.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    q6k_place_heads(const u16* q, const u16* k, const u16* v, i64 q_stride, i64 k_stride, i64 v_stride, u16* queries,
                    i64 of_row, i64 of_group, void* keys, void* values, float* key_scales, float* value_scales,
                    u16* more_keys, u16* more_values,
                    const float* cosines, const float* sines, const float* q_norm, const float* k_norm,
                    const float* growth, float epsilon, int start, int count, int key_heads, int slots, int more_slots,
                    int more_first, int values_normed, int rotated, int query_size, int neighbours,
                    int rotates_first) {
  __shared__ __align__(16) u16 exchanged[WARPS][DIM];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.x, half = rotated / 2;
  const int first = (blockIdx.y * WARPS + warp) * TOGETHER, all = count + (k != nullptr ? 2 * key_heads : 0);
  const i64 angles = (i64)(start + row) * half;
  let_dependents_start();
  float turn[PARTS][4] = {}, lean[PARTS][4] = {};
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const int d = 4 * lane + 128 * i;
    if (d >= rotated) break;
    const i64 at = angles + (neighbours ? d / 2 : d < half ? d : d - half);
    load_4(cosines + at, turn[i], neighbours);
    load_4(sines + at, lean[i], neighbours);
  }
  const float grown = growth == nullptr ? 1.0f : growth[start + row];
  wait_for_previous_grid();
  uint2 raw[TOGETHER][PARTS] = {};
#pragma unroll
  for (int n = 0; n < TOGETHER; ++n) {
    const int vector = first + n, key = vector - count;
    if (vector >= all) break;
    const u16* const from = key < 0           ? q + row * q_stride + (i64)vector * query_size
                            : key < key_heads ? k + row * k_stride + key * DIM
                                              : v + row * v_stride + (key - key_heads) * DIM;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      const int d = 4 * lane + 128 * i;
      if (d < DIM) raw[n][i] = *reinterpret_cast<const uint2*>(from + d);
    }
  }
#pragma unroll
  for (int n = 0; n < TOGETHER; ++n) {
    const int vector = first + n, key = vector - count;
    if (vector >= all) break;
    const bool is_query = key < 0, is_value = key >= key_heads;
    const float* const weight = is_query ? q_norm : is_value ? nullptr : k_norm;
    const bool normed = is_value ? values_normed : weight != nullptr;
    if (normed && (is_value || !rotates_first)) norm(raw[n], weight, epsilon);
    if (!is_value) {
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        const int d = 4 * lane + 128 * i;
        if (d < DIM) *reinterpret_cast<uint2*>(exchanged[warp] + d) = raw[n][i];
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        const int d = 4 * lane + 128 * i;
        float found[4], other[4] = {};
        to_floats(raw[n][i], found);
        if (d < rotated) {
          if (neighbours) {
            other[0] = -found[1], other[1] = found[0], other[2] = -found[3], other[3] = found[2];
          } else {
            to_floats(*reinterpret_cast<const uint2*>(exchanged[warp] + (d < half ? d + half : d - half)), other);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            found[j] = fmaf(found[j], turn[i][j], (!neighbours && d < half ? -other[j] : other[j]) * lean[i][j]);
          }
        }
        if (is_query) {
#pragma unroll
          for (int j = 0; j < 4; ++j) found[j] *= grown;
        }
        raw[n][i] = to_halves(found);
      }
      __syncwarp();
      if (normed && rotates_first) norm(raw[n], weight, epsilon);
      if (Q6K_CODES) mix(raw[n]);
    }
    const int rows = gridDim.x, head = is_query ? vector : is_value ? key - key_heads : key;
    const i64 of_head = (i64)slots * DIM;
    const Place place =
        is_query ? Place{queries, of_group, of_row, count / key_heads, 0, 0, 0}
                 : Place{static_cast<u16*>(is_value ? values : keys), of_head, DIM, 1, rows - slots, start, slots};
    const Place more = {is_value ? more_values : more_keys, (i64)more_slots * DIM, DIM, 1, 0, more_first, 0};
    const bool codes = Q6K_CODES && !is_query;
    if (codes) {
      const i64 at = (i64)head * slots + place.slot_of(row);
      code(raw[n], static_cast<s8*>(is_value ? values : keys) + at * DIM,
           (is_value ? value_scales : key_scales) + at, place.takes(row));
    }
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      const int d = 4 * lane + 128 * i;
      if (d >= DIM) break;
      if (!codes) place.store(head, row, d, raw[n][i]);
      if (!is_query) more.store(head, row, d, raw[n][i]);
    }
  }
}

// Expands codes: keys and values (key heads, slots, DIM), with their scales (key heads, slots), of positions `first` to
// before first + count, position p in slot p modulo `slots`, to 16 bits side by side, (key heads, to_slots, DIM).
// Grid: count * DIM / 16 values x key heads x 2, keys and values.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    q6k_expand_codes(const s8* keys, const s8* values, const float* key_scales, const float* value_scales, u16* to_keys,
                     u16* to_values, int slots, int first, int count, int to_slots) {
  const int at = blockIdx.x * WARPS * 32 + threadIdx.x, row = at / (DIM / 16), d = at % (DIM / 16) * 16;
  let_dependents_start();
  wait_for_previous_grid();
  if (row >= count) return;
  const i64 from = (i64)blockIdx.y * slots + (first + row) % slots, to = (i64)blockIdx.y * to_slots + row;
  const uint4 codes = *reinterpret_cast<const uint4*>((blockIdx.z ? values : keys) + from * DIM + d);
  const float scale = (blockIdx.z ? value_scales : key_scales)[from];
  u32 pairs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const u32 two = word_of(codes, i / 2) >> 16 * (i & 1);
    pairs[i] = pack_halves((float)(s8)(two & 0xFFu) * scale, (float)(s8)(two >> 8 & 0xFFu) * scale);
  }
  uint4* const out = reinterpret_cast<uint4*>((blockIdx.z ? to_values : to_keys) + to * DIM + d);
  out[0] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  out[1] = {pairs[4], pairs[5], pairs[6], pairs[7]};
}

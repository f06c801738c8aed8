// What a block does of the attention of a token: up to eight query heads attend to a share of the keys of the head
// that they have in common. A kernel calls the steps in this order, by the same warps, numbered from 0; it may have
// more; nothing here depends on its grid. heads.cuh comes before this file.
//
//   request   asks for the warps' first keys and values, which needs no query
//   attend    goes over the share and leaves each warp's sums, maxima and weights in shared memory. Before it the
//             queries, and the token's own key and value, lie in AttendShared, behind a barrier of these warps
//   merged    adds the warps' sums of an output, after another barrier of these warps
//
// Groups of asynchronous copies, of each thread: `request` commits two for each of the STAGES pieces of a warp's ring,
// keys and values, even if it copies nothing. `attend` expects that none was committed since; it waits for those and
// so for all before them, and always leaves 2 * STAGES empty groups pending, committed last, behind which a kernel may
// commit its own. A warp without keys waits for nothing: those of `request`, all empty, are pending then.
//
// Matrix instructions multiply 16 keys of a warp with the query heads, then values with weights: attend_halves.cuh for
// keys and values of 16 bits, attend_codes.cuh for 8, of which one comes before this file.

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^(score - largest); 0 for a score of minus infinity, even if that is the largest. NaN stays NaN.
__device__ __forceinline__ float weight_of(float score, float largest) {
  return score == minus_infinity() ? 0.0f : power_of_two(score - largest);
}

// Copies 16 bytes, or zeros.
__device__ __forceinline__ void copy_or_clear_16(u32 to_shared, const void* from, bool copy) {
  const int bytes = copy ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from), "r"(bytes) : "memory");
}

// Reduces over lanes with the same t, which have the keys of one head.
__device__ __forceinline__ float largest_of_keys(float value) {
#pragma unroll
  for (int apart = 4; apart < 32; apart <<= 1) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, apart));
  return value;
}

// The keys that a block attends to: slots `begin` to before `end` of a key head's, (slots, DIM). The token's own key
// and value come from shared memory instead of their slot.
struct KeyShare {
  const Held *keys, *values;
  i64 here;                                 // the token's position
  int begin, end, own_slot, slots, window;  // a window's slots are a ring; 0 if slot and position are equal
  const float *key_scales, *value_scales;   // of codes, (slots,)
};

// Of `used` slots, the share of a part: whole pieces of ATTEND_KEYS, as equal as these allow.
__device__ __forceinline__ void take_share(KeyShare& share, int used, int part, int parts) {
  const int keys = ((used + parts - 1) / parts + ATTEND_KEYS - 1) / ATTEND_KEYS * ATTEND_KEYS;
  share.begin = part * keys;
  share.end = min(share.begin + keys, used);
}

// What warps share, besides their rings of keys and values.
template <int WARPS>
struct AttendShared {
  __align__(16) u16 queries[ATTEND_HEADS + 1][DIM + 8];  // heads that the block lacks are 0; and the token's key
  __align__(16) u16 own_value[DIM];
#if Q6K_CODES
  __align__(16) s8 own_codes[2][DIM];  // of key and value
  float own_scales[2];
#endif
  float maxima[WARPS][ATTEND_HEADS], weights[WARPS][ATTEND_HEADS];

  // The token's own key or value, as the cache will hold it.
  __device__ __forceinline__ Held* own(bool is_value) {
#if Q6K_CODES
    return own_codes[is_value];
#else
    return is_value ? own_value : queries[ATTEND_HEADS];
#endif
  }
};

// An output of a block: the sum of weighted values, and its head's largest score and sum of weights.
struct Merged {
  float total, most, weight;
};

// STAGES: pieces of keys and of values that a warp has in its ring, and so in flight.
template <int WARPS, int STAGES = 1>
struct AttendBlock {
  static constexpr int HALF = Piece::BYTES, STEP = WARPS * ATTEND_KEYS;
  static constexpr int WARP_BYTES = STAGES * 2 * HALF;  // keys, values; then sums
  static constexpr int SUMS_BYTES = ATTEND_HEADS * (DIM + 8) * 4;
  static constexpr int BYTES = WARPS * WARP_BYTES;  // of `ring`
  static_assert(SUMS_BYTES <= WARP_BYTES, "sums take the place of keys and values");

  const KeyShare& share;
  u8* ring;  // shared memory, aligned to 16 bytes
  int warp, lane;

  __device__ __forceinline__ void request() const {
    for (int stage = 0; stage < STAGES; ++stage) {
      const int first = begin() + stage * STEP;
      copy_keys(ring_at() + stage * 2 * HALF, first);
      copy(share.values, ring_at() + stage * 2 * HALF + HALF, first);
      commit_copies();
    }
  }

  // `scale` of the scores; softcap, 0 for none.
  __device__ __forceinline__ void attend(AttendShared<WARPS>& shared, float scale, float softcap) const {
    const int g = lane >> 2, t = lane & 3;
    const u32 ring_begin = ring_at();
    const Piece::Queries queries(shared.queries, lane);
    const float factor = softcap == 0.0f ? scale * LOG2_E : scale / softcap;
    const float factors[2] = {factor * queries.factor(2 * t), factor * queries.factor(2 * t + 1)};
    // Of heads 2t and 2t + 1; see Piece for the sums.
    float sums[DIM / 16][4] = {}, largest[2] = {minus_infinity(), minus_infinity()}, weight[2] = {};
    int stage = 0;
    for (int first = begin(); first < share.end; first += STEP) {
      const int following = first + STAGES * STEP;
      const u32 keys_at = ring_begin + stage * 2 * HALF, values_at = keys_at + HALF;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      wait_copies<2 * STAGES - 1>();  // for the keys; the values may still be copied
      __syncwarp();
      put_own(shared, false, keys_at, first);
      float parts[2][4] = {}, scores[4];  // keys g and g + 8, heads 2t and 2t + 1
      Piece::score(parts, keys_at, queries, lane);
      float key_scales[2] = {1.0f, 1.0f}, value_scales[2] = {1.0f, 1.0f};
      bool seen[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        seen[i] = is_seen(first + g + i * 8);
#if Q6K_CODES
        if (seen[i]) {
          key_scales[i] = scales_of(keys_at)[g + i * 8];
          value_scales[i] = scales_of(keys_at)[ATTEND_KEYS + g + i * 8];
        }
#endif
      }
      __syncwarp();
      copy_keys(keys_at, following);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[i] = (parts[0][i] + parts[1][i]) * (factors[i & 1] * key_scales[i / 2]);
        if (softcap != 0.0f) scores[i] = softcap * LOG2_E * tanhf(scores[i]);
        if (Q6K_CODES) scores[i] += __log2f(value_scales[i / 2]);
        if (!seen[i / 2]) scores[i] = minus_infinity();
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float most = fmaxf(largest[h], largest_of_keys(fmaxf(scores[h], scores[h + 2])));
        const float fade = weight_of(largest[h], most);
        largest[h] = most;
        scores[h] = weight_of(scores[h], most);
        scores[h + 2] = weight_of(scores[h + 2], most);
        // Of this lane's keys, until the end.
        weight[h] = weight[h] * fade + (Q6K_CODES ? __fdividef(scores[h], value_scales[0]) +
                                                        __fdividef(scores[h + 2], value_scales[1])
                                                  : scores[h] + scores[h + 2]);
#pragma unroll
        for (int i = 0; i < DIM / 16; ++i) sums[i][h] *= fade, sums[i][h + 2] *= fade;
      }
      const u32 b0 = transposed(pack_weights(scores[0], scores[1]));
      const u32 b1 = transposed(pack_weights(scores[2], scores[3]));
      wait_copies<2 * STAGES - 1>();  // for the values; the next keys may still be copied
      __syncwarp();
      put_own(shared, true, values_at, first);
      Piece::add(sums, values_at, b0, b1, lane);
      __syncwarp();
      copy(share.values, values_at, following);
      commit_copies();
    }

    // A warp's sums take the place of its keys.
    float* const warp_sums = reinterpret_cast<float*>(ring + warp * WARP_BYTES);
#pragma unroll
    for (int i = 0; i < DIM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        warp_sums[(2 * t + (j & 1)) * (DIM + 8) + Piece::dim_of(i, j / 2, g)] = sums[i][j];
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int apart = 4; apart < 32; apart <<= 1) weight[h] += __shfl_xor_sync(0xFFFFFFFFu, weight[h], apart);
      if (g == 0) shared.maxima[warp][2 * t + h] = largest[h], shared.weights[warp][2 * t + h] = weight[h];
    }
  }

  // Value d of head h. Any thread's, not only of a warp that has attended.
  static __device__ __forceinline__ Merged merged(const u8* ring, const AttendShared<WARPS>& shared, int h, int d) {
    Merged all = {0.0f, minus_infinity(), 0.0f};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all.most = fmaxf(all.most, shared.maxima[w][h]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float fade = weight_of(shared.maxima[w][h], all.most);
      const float* const warp_sums = reinterpret_cast<const float*>(ring + w * WARP_BYTES);
      all.total = fmaf(warp_sums[h * (DIM + 8) + d], fade, all.total);
      all.weight = fmaf(shared.weights[w][h], fade, all.weight);
    }
    return all;
  }

 private:
  __device__ __forceinline__ int begin() const { return share.begin + warp * ATTEND_KEYS; }

  __device__ __forceinline__ u32 ring_at() const { return shared_address(ring) + warp * WARP_BYTES; }

  __device__ __forceinline__ bool has_own(int first) const {
    return first <= share.own_slot && share.own_slot < first + ATTEND_KEYS;
  }

  // Keys or values of a piece, without a group of copies.
  __device__ __forceinline__ void copy(const Held* from, u32 to, int first) const {
    constexpr int CHUNK = 16 / sizeof(Held), CHUNKS = DIM / CHUNK;  // values that are copied at once; those of a row
    if (first >= share.end) return;
    const Held* const piece = from + (i64)first * DIM;
    constexpr int PIECES = ATTEND_KEYS * CHUNKS / 32;  // of a lane
    const bool whole = first + ATTEND_KEYS <= share.end && !has_own(first);
    auto row_of = [&](int i) { return to + (i * 32 + lane) / CHUNKS * Piece::ROW + (i * 32 + lane) % CHUNKS * 16; };
    if (whole) {
#pragma unroll
      for (int i = 0; i < PIECES; ++i) copy_async_16(row_of(i), piece + (i * 32 + lane) * CHUNK);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < PIECES; ++i) {  // seldom, so short
      const int at = i * 32 + lane, slot = first + at / CHUNKS;
      const bool copies = slot < share.end && slot != share.own_slot;
      copy_or_clear_16(row_of(i), copies ? piece + at * CHUNK : from, copies);
    }
  }

  // A group of copies, even if it copies nothing: keys of a piece; of codes, also the scales of keys and values.
  __device__ __forceinline__ void copy_keys(u32 to, int first) const {
    copy(share.keys, to, first);
#if Q6K_CODES
    const int four = lane & 3, slot = first + 4 * four;  // slots are whole fours
    if (lane < 8 && slot < share.end) {
      copy_async_16(to + Piece::SCALES_AT + lane * 16, (lane < 4 ? share.key_scales : share.value_scales) + slot);
    }
#endif
    commit_copies();
  }

  __device__ __forceinline__ u8* pointer_to(u32 address) const { return ring + (address - shared_address(ring)); }

#if Q6K_CODES
  __device__ __forceinline__ float* scales_of(u32 keys) const {
    return reinterpret_cast<float*>(pointer_to(keys + Piece::SCALES_AT));
  }
#endif

  // The token's own key, or value, to its row; of codes, beside keys, also both scales.
  __device__ __forceinline__ void put_own(AttendShared<WARPS>& shared, bool is_value, u32 to, int first) const {
    if (has_own(first)) {
      const int r = share.own_slot - first;
      uint4* const row = reinterpret_cast<uint4*>(pointer_to(to + r * Piece::ROW));
      const uint4* const own = reinterpret_cast<const uint4*>(shared.own(is_value));
      for (int at = lane; at < DIM * (int)sizeof(Held) / 16; at += 32) row[at] = own[at];
#if Q6K_CODES
      if (!is_value && lane < 2) scales_of(to)[lane * ATTEND_KEYS + r] = shared.own_scales[lane];
#endif
    }
    __syncwarp();
  }

  __device__ __forceinline__ bool is_seen(int slot) const {
    if (slot >= share.end) return false;
    if (!share.window) return true;
    return share.here - (share.here - slot) % share.slots > share.here - share.window;
  }
};

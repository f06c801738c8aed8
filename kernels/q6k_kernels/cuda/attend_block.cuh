// What a block does of the attention of a token: up to eight query heads attend to a share of the keys of the head
// that they have in common. A kernel calls the steps in this order, by the same warps, numbered from 0; it may have
// more; nothing here depends on its grid. heads.cuh comes before this file.
//
//   request   asks for the warps' first keys and values, which needs no query
//   attend    goes over the share and leaves each warp's sums, maxima and weights in shared memory. Before it the
//             queries, and the token's own key and value, lie in AttendShared, behind a barrier of these warps
//   merged    adds the warps' sums of an output, after another barrier of these warps
//
// Groups of asynchronous copies, of each thread: `request` commits two, the keys and the values, even if it copies
// nothing. `attend` expects that none was committed since, waits for those two and so for all that were committed
// before them, and always leaves two empty groups pending, committed last, behind which a kernel may commit its own.
// A warp without keys waits for nothing: its four groups, all empty, are pending at the end.
//
// Matrix instructions multiply 16 keys of a warp with the query heads, then values with weights.

constexpr int ATTEND_HEADS = 8;  // columns of a product; a block may have fewer
constexpr int ATTEND_KEYS = 16;  // of a warp at a time
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
  const u16 *keys, *values;
  i64 here;                               // the token's position
  int begin, end, own_slot, slots, window;  // a window's slots are a ring; 0 if slot and position are equal
};

// Of `used` slots, the share of a part: whole groups of keys, as equal as these allow.
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
  float maxima[WARPS][ATTEND_HEADS], weights[WARPS][ATTEND_HEADS];
};

// An output of a block: the sum of weighted values, and its head's largest score and sum of weights.
struct Merged {
  float total, most, weight;
};

template <int WARPS>
struct AttendBlock {
  static constexpr int ROW = DIM * 2 + 16;  // bytes of a key or value in shared memory: rows that are read together
                                            // are in distinct banks
  static constexpr int HALF = ATTEND_KEYS * ROW;
  static constexpr int WARP_BYTES = 2 * HALF;  // keys, values; then sums: ATTEND_HEADS rows of DIM + 8 floats
  static constexpr int BYTES = WARPS * WARP_BYTES;  // of `ring`

  const KeyShare& share;
  u8* ring;  // shared memory, aligned to 16 bytes
  int warp, lane;

  __device__ __forceinline__ void request() const {
    const int first = share.begin + warp * ATTEND_KEYS;
    copy(share.keys, keys_at(), first);
    copy(share.values, keys_at() + HALF, first);
  }

  // `scale` of the scores; softcap, 0 for none.
  __device__ __forceinline__ void attend(AttendShared<WARPS>& shared, float scale, float softcap) const {
    const int g = lane >> 2, t = lane & 3;
    u8* const own_shared = ring + warp * WARP_BYTES;
    // sums[i]: dims 16 i + g and + 8, heads 2t and 2t + 1; `largest` and `weight` are of the same heads.
    float sums[DIM / 16][4] = {}, largest[2] = {minus_infinity(), minus_infinity()}, weight[2] = {};
    for (int first = share.begin + warp * ATTEND_KEYS; first < share.end; first += WARPS * ATTEND_KEYS) {
      wait_copies<1>();  // for the keys; the values may still be copied
      __syncwarp();
      put_own(own_shared, shared.queries[ATTEND_HEADS], first);
      float scores[4] = {};  // keys g and g + 8, heads 2t and 2t + 1
      const u32 key_at = keys_at() + (lane & 15) * ROW + (lane >> 4) * 16;
#pragma unroll
      for (int c = 0; c < DIM / 16; ++c) {
        u32 a[4];
        load_matrices(a, key_at + c * 32);
        const u16* const b = &shared.queries[g][c * 16 + t * 2];
        multiply(scores, a[0], a[1], a[2], a[3], *reinterpret_cast<const u32*>(b),
                 *reinterpret_cast<const u32*>(b + 8));
      }
      __syncwarp();
      copy(share.keys, keys_at(), first + WARPS * ATTEND_KEYS);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[i] *= scale;
        if (softcap != 0.0f) scores[i] = softcap * tanhf(scores[i] / softcap);
        scores[i] = is_seen(first + g + i / 2 * 8) ? scores[i] * LOG2_E : minus_infinity();
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float most = fmaxf(largest[h], largest_of_keys(fmaxf(scores[h], scores[h + 2])));
        const float fade = weight_of(largest[h], most);
        largest[h] = most;
        scores[h] = weight_of(scores[h], most);
        scores[h + 2] = weight_of(scores[h + 2], most);
        weight[h] = weight[h] * fade + scores[h] + scores[h + 2];  // of this lane's keys, until the end
#pragma unroll
        for (int i = 0; i < DIM / 16; ++i) sums[i][h] *= fade, sums[i][h + 2] *= fade;
      }
      const u32 b0 = transposed(pack_halves(scores[0], scores[1]));
      const u32 b1 = transposed(pack_halves(scores[2], scores[3]));
      wait_copies<1>();  // for the values; the next keys may still be copied
      __syncwarp();
      put_own(own_shared + HALF, shared.own_value, first);
      const u32 value_at = keys_at() + HALF + ((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 16;
#pragma unroll
      for (int i = 0; i < DIM / 16; ++i) {
        u32 a[4];
        load_transposed(a, value_at + i * 32);
        multiply(sums[i], a[0], a[1], a[2], a[3], b0, b1);
      }
      __syncwarp();
      copy(share.values, keys_at() + HALF, first + WARPS * ATTEND_KEYS);
    }

    // A warp's sums take the place of its keys.
    float* const warp_sums = reinterpret_cast<float*>(own_shared);
#pragma unroll
    for (int i = 0; i < DIM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) warp_sums[(2 * t + (j & 1)) * (DIM + 8) + i * 16 + g + j / 2 * 8] = sums[i][j];
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
  __device__ __forceinline__ u32 keys_at() const { return shared_address(ring) + warp * WARP_BYTES; }

  // A group of copies, even if it copies nothing.
  __device__ __forceinline__ void copy(const u16* from, u32 to, int first) const {
    if (first < share.end) {
      for (int at = lane; at < ATTEND_KEYS * (DIM / 8); at += 32) {
        const int r = at / (DIM / 8), inside = at % (DIM / 8), slot = first + r;
        const bool copies = slot < share.end && slot != share.own_slot;
        copy_or_clear_16(to + r * ROW + inside * 16, from + (i64)(copies ? slot : 0) * DIM + inside * 8, copies);
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ void put_own(u8* to, const u16* vector, int first) const {
    if (first <= share.own_slot && share.own_slot < first + ATTEND_KEYS) {
      uint4* const row = reinterpret_cast<uint4*>(to + (share.own_slot - first) * ROW);
      for (int at = lane; at < DIM / 8; at += 32) row[at] = reinterpret_cast<const uint4*>(vector)[at];
    }
    __syncwarp();
  }

  __device__ __forceinline__ bool is_seen(int slot) const {
    if (slot >= share.end) return false;
    if (!share.window) return true;
    return share.here - (share.here - slot) % share.slots > share.here - share.window;
  }
};

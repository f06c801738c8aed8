// Attention of one token of each text: norms and rotary embedding, then its key and value go into the cache. The keys
// are split over blocks (attend_block.cuh); the last to finish adds the results of all and quantises them (quantize.cuh).
//
//   Q6K_HEAD_DIM  see heads.cuh
//   Q6K_WARPS     warps of a block
//   Q6K_STAGES    pieces of keys in a warp's ring
//   Q6K_TEXTS     1: of several texts, or of one in a cache with places
//   Q6K_FORMS     0 without code for norms of projections and rotated heads, neighbours, sinks and padding of outputs
//
// Whatever does not depend on the previous launch is loaded before the wait for that launch: above all the keys and
// values of earlier steps, which go to shared memory.

#ifndef Q6K_FORMS
#define Q6K_FORMS 1
#endif
#ifndef Q6K_TEXTS
#define Q6K_TEXTS 0
#endif
#ifndef Q6K_WARPS
#define Q6K_WARPS 8
#endif
#ifndef Q6K_STAGES
#define Q6K_STAGES 1
#endif

// Elsewhere the compiler would spill a few registers, so that two blocks find room.
#if __CUDA_ARCH__ == 900
#define Q6K_LIMITS __launch_bounds__(THREADS)
#else
#define Q6K_LIMITS __launch_bounds__(THREADS, 1)
#endif

static_assert(TOKENS == 1 && !Q6K_FUSED, "a step is of one token, quantised once for all blocks");

constexpr int WARPS = Q6K_WARPS;
constexpr int THREADS = WARPS * 32;
constexpr int HEADS = ATTEND_HEADS;
constexpr int MOST_BLOCKS = 32;  // most blocks that share keys: a lane of a warp for each

__device__ __forceinline__ float load_of_others(const float* from) {  // bypasses this multiprocessor's cache
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}

// Two outputs times the logistic function of their gates, which lie side by side; rounded as 16-bit layers do.
__device__ __forceinline__ u32 gated_pair(u32 pair, const u16* gates) {
  float factors[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float factor = __fdividef(1.0f, 1.0f + __expf(-half_to_float(gates[i])));
    factors[i] = half_to_float(i ? pair >> 16 : pair & 0xFFFFu) * half_to_float(to_half(factor));
  }
  return pack_halves(factors[0], factors[1]);
}

// Parameters: the token's q (all heads, DIM), k and v (key heads, DIM), 16-bit, or null for k and v if an earlier
// launch of this step has written them to the cache; keys and values, the cache (key heads, slots, DIM), 16-bit, or
// codes with key_scales and value_scales, fp32 (key heads, slots), else null; cosines and sines fp32 (positions, rotated / 2); q_norm, k_norm fp32 (DIM,), of a projection (all or key heads,
// DIM), or null; the token's position; growth fp32 (positions,), factors of the scores besides `scale`, or null; sinks
// fp32 (all heads,), scores of no key that take a part of the weights, or null; partials fp32, heads * (DIM + 2) for
// each block; counters, 0, one for each row of blocks; x 16-bit (all heads * DIM,), or null; codes and steps, as
// q6k_quantize writes them, or null; the scores' scale; softcap, 0 for none; the norms' epsilon; slots; window, the
// size of a ring of slots, or 0 if slot and position are equal; heads of a block, at most HEADS; group, query heads
// for each key head, a multiple of `heads`; whether v has a norm, without weights; gated, whether q is
// (all heads, query and gate, DIM); normed, rotated and neighbours, see HeadForm; and with TEXTS only: the cache has
// places, as have positions, and text i is in places[i]; its token has q, k and v `q_stride`, `k_stride` and `v_stride`
// behind those of the one before, its own partials and counters, and x; of more than one `codes` is null.
// Grid: blocks that share keys, at most MOST_BLOCKS, x (all heads / heads) x texts. Shared memory: AttendBlock::BYTES.
extern "C" __global__ void Q6K_LIMITS
    q6k_attend(const u16* q, const u16* k, const u16* v, Held* keys, Held* values, float* key_scales,
               float* value_scales, const float* cosines, const float* sines, const float* q_norm, const float* k_norm, const i64* position, const float* growth,
               const float* sinks, float* partials, u32* counters, u16* x, u8* codes, float* steps, float scale,
               float softcap, float epsilon, int slots, int window, int heads, int group, int values_normed, int gated,
               int normed, int rotated, int neighbours, const i64* places, i64 q_stride, i64 k_stride, i64 v_stride) {
  if (!Q6K_FORMS) normed = HEAD, neighbours = 0, sinks = nullptr;
  extern __shared__ __align__(16) u8 ring[];
  __shared__ AttendShared<WARPS> shared;
  __shared__ float squares[2][WARPS];
  __shared__ __align__(16) u16 staged[WARPS][64];
  __shared__ bool last;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row = blockIdx.y, head = row * heads / group;  // of keys
  const int query_size = gated ? 2 * DIM : DIM;            // with its gate
  // By a macro, not a null pointer: addresses that are computed take registers, and parameters none. Those that are
  // needed late are computed late.
  const i64 text = Q6K_TEXTS ? blockIdx.z : 0, place = Q6K_TEXTS ? places[text] : 0;
  if (Q6K_TEXTS) q += text * q_stride, k = k == nullptr ? k : k + text * k_stride, v += text * v_stride;

  // The previous step ended before this one began, so its position and its keys are in memory.
  const i64 here = position[place];
  if (growth != nullptr) scale *= growth[here];
  const int used = (int)min(here + 1, (i64)slots), own_slot = (int)(window ? here % slots : here);
  const i64 all_head = place * (gridDim.y * heads / group) + head;  // of all places
  Held* const head_keys = keys + all_head * slots * DIM;
  Held* const head_values = values + all_head * slots * DIM;
#if Q6K_CODES
  float* const own_scale = (threadIdx.x ? value_scales : key_scales) + all_head * slots + own_slot;  // of two threads
#endif
  KeyShare share = {head_keys, head_values, here, 0, 0, own_slot, slots, window, key_scales + all_head * slots,
                    value_scales + all_head * slots};
  take_share(share, used, blockIdx.x, gridDim.x);
  const AttendBlock<WARPS, Q6K_STAGES> block = {share, ring, warp, lane};
  block.request();
  const float* const here_cosines = cosines + here * (rotated / 2);
  const float* const here_sines = sines + here * (rotated / 2);
  const HeadForm form = {normed, rotated, neighbours, epsilon};
  auto norm_of = [&](int vector) {
    const float* const weight = vector < heads ? q_norm : k_norm;
    if (weight == nullptr || normed != PROJECTION) return weight;
    return weight + (vector < heads ? row * heads + vector : head) * DIM;
  };
  Rotation rotation;
  rotation.load(norm_of(warp), here_cosines, here_sines, form);

  wait_for_previous_grid();
  const bool has_keys = k != nullptr;
  float of_queries = OWN, of_keys = OWN;
  if (normed == PROJECTION) {
    const int all = heads * (int)gridDim.y;
    of_queries = inverse_of(q, all, query_size, epsilon, squares[0]);
    if (has_keys) of_keys = inverse_of(k, all / group, DIM, epsilon, squares[1]);
  }
  for (int vector = warp; vector < heads + has_keys; vector += WARPS) {
    const bool is_key = vector == heads;
    if (vector != warp) rotation.load(norm_of(vector), here_cosines, here_sines, form);
    rotation.apply(is_key ? k + head * DIM : q + (row * heads + vector) * query_size, form,
                   (is_key ? k_norm : q_norm) != nullptr, is_key ? of_keys : of_queries,
                   shared.queries[is_key ? HEADS : vector]);
#if Q6K_CODES
    __syncwarp();
    if (is_key) code_vector(shared.queries[HEADS], shared.own_codes[0], shared.own_scales, lane);
#endif
  }
  for (int at = heads * DIM + threadIdx.x; at < HEADS * DIM; at += THREADS) shared.queries[at / DIM][at % DIM] = 0;
  if (!has_keys) {
    for (int d = threadIdx.x; d < DIM; d += THREADS) {
      shared.own(false)[d] = head_keys[(i64)own_slot * DIM + d];
      shared.own(true)[d] = head_values[(i64)own_slot * DIM + d];
    }
#if Q6K_CODES
    if (threadIdx.x < 2) shared.own_scales[threadIdx.x] = *own_scale;
#endif
  } else if (!Q6K_CODES && !values_normed) {
    for (int d = threadIdx.x; d < DIM; d += THREADS) shared.own_value[d] = v[head * DIM + d];
  } else if (warp == WARPS - 1) {  // which has the fewest vectors above
    if (values_normed) {
      normed_without_weights(v + head * DIM, epsilon, shared.own_value);
    } else {
      for (int d = lane; d < DIM; d += 32) shared.own_value[d] = v[head * DIM + d];
    }
#if Q6K_CODES
    __syncwarp();
    code_vector(shared.own_value, shared.own_codes[1], shared.own_scales + 1, lane);
#endif
  }
  __syncthreads();
  let_dependents_start();  // as late as this: its copies would delay the loads above
  // One of the blocks that share this key head writes.
  if (has_keys && share.begin <= own_slot && own_slot < share.end && row * heads % group == 0) {
    for (int d = threadIdx.x; d < DIM; d += THREADS) {
      head_keys[(i64)own_slot * DIM + d] = shared.own(false)[d];
      head_values[(i64)own_slot * DIM + d] = shared.own(true)[d];
    }
#if Q6K_CODES
    if (threadIdx.x < 2) *own_scale = shared.own_scales[threadIdx.x];
#endif
  }

  block.attend(shared, scale, softcap);
  __syncthreads();
  const int outputs = heads * DIM, partial_size = outputs + 2 * heads;  // even: sums are read in pairs
  float* const row_partials = partials + (text * gridDim.y + row) * gridDim.x * partial_size;
  float* const partial = row_partials + blockIdx.x * partial_size;
  for (int o = threadIdx.x; o < outputs; o += THREADS) {
    const int h = o / DIM, d = o % DIM;
    const Merged all = block.merged(ring, shared, h, d);
    partial[o] = all.total;
    if (d == 0) partial[outputs + h] = all.most, partial[outputs + heads + h] = all.weight;
  }

  // Then blocks, always in their order, so that the result never depends on which is the last.
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 before, *const counter = counters + text * gridDim.y + row;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    last = before == gridDim.x - 1;
    if (last) *counter = 0;  // for the next launch
  }
  __syncthreads();
  if (!last) return;
  const int k_out = outputs * gridDim.y;
  // A warp adds 64 outputs, a lane two, of one head or two. All loads are issued at once: a lane loads the maximum
  // and weight of one block, and every block's part of its own outputs.
  for (int out = warp * 64; out < outputs; out += WARPS * 64) {
    const int blocks = gridDim.x, own = min(out + 2 * lane, outputs - 2), own_head = own / DIM;
    const int two[2] = {out / DIM, min(out + 63, outputs - 1) / DIM};
    float most[2] = {minus_infinity(), minus_infinity()}, all[2] = {}, parts[MOST_BLOCKS][2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (lane >= blocks) continue;
      most[j] = load_of_others(row_partials + lane * partial_size + outputs + two[j]);
      all[j] = load_of_others(row_partials + lane * partial_size + outputs + heads + two[j]);
    }
#pragma unroll
    for (int i = 0; i < MOST_BLOCKS; ++i) {
      if (i >= blocks) break;
      asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
                   : "=f"(parts[i][0]), "=f"(parts[i][1])
                   : "l"(row_partials + i * partial_size + own)
                   : "memory");
    }
    float fade[2], total[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float largest_of_all = most[j];
#pragma unroll
      for (int apart = 16; apart; apart >>= 1) {
        largest_of_all = fmaxf(largest_of_all, __shfl_xor_sync(0xFFFFFFFFu, largest_of_all, apart));
      }
      const float sink = sinks == nullptr ? minus_infinity() : sinks[row * heads + two[j]] * LOG2_E;
      largest_of_all = fmaxf(largest_of_all, sink);
      fade[j] = weight_of(most[j], largest_of_all);
      fade[j] /= sum_of_warp(all[j] * fade[j]) + weight_of(sink, largest_of_all);
    }
#pragma unroll
    for (int i = 0; i < MOST_BLOCKS; ++i) {
      if (i >= blocks) break;
      const float of_first = __shfl_sync(0xFFFFFFFFu, fade[0], i), of_second = __shfl_sync(0xFFFFFFFFu, fade[1], i);
      const float of_block = own_head == two[0] ? of_first : of_second;
      total[0] = fmaf(parts[i][0], of_block, total[0]);
      total[1] = fmaf(parts[i][1], of_block, total[1]);
    }
    u32 pair = pack_halves(total[0], total[1]);
    if (gated) pair = gated_pair(pair, q + (i64)(row * heads + own_head) * query_size + DIM + own % DIM);
    const bool present = out + 2 * lane < outputs;
    reinterpret_cast<u32*>(staged[warp])[lane] = pair;
    const int at = row * outputs + out;
    if (x != nullptr && present) reinterpret_cast<u32*>(x + text * k_out + at)[lane] = pair;
    __syncwarp();
    uint4 raw[2] = {};
    const bool quantises = lane < 4 && out + 16 * lane < outputs;
    if (quantises) {
      raw[0] = reinterpret_cast<const uint4*>(staged[warp])[lane * 2];
      raw[1] = reinterpret_cast<const uint4*>(staged[warp])[lane * 2 + 1];
    }
    if (codes != nullptr) quantize_into(Quantized::all(codes, steps, k_out), raw, 0, at / 16 + lane, quantises);
    __syncwarp();
  }
  if (Q6K_FORMS && codes != nullptr && row == gridDim.y - 1 && warp == WARPS - 1) {
    quantize_padding(Quantized::all(codes, steps, k_out), k_out);
  }
}

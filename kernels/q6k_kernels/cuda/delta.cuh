// A gated delta net for one token: convolution, norms and gates, the update of a head's state, its norm and gate,
// and the quantisation that the next product needs (quantize.cuh, before this file, with one token).
//
// A block has one value head, whose state of DIM x DIM numbers stays in its registers: a warp has ROWS rows, a lane
// four columns. The state is loaded before the wait for the previous launch, as only the previous step wrote it.

static_assert(TOKENS == 1 && !Q6K_FUSED, "a step is of one token, quantised once for all blocks");

constexpr int DIM = 128;  // of keys and values
constexpr int WARPS = 16, THREADS = WARPS * 32, ROWS = DIM / WARPS, PARTS = DIM / 32;
constexpr float L2_EPSILON = 1e-6f;

__device__ __forceinline__ float silu(float value) { return value / (1.0f + expf(-value)); }

// Adds the numbers of PARTS neighbouring warps, in one order.
__device__ __forceinline__ float sum_of_parts(const float* parts) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PARTS; ++i) sum += parts[i];
  return sum;
}

__device__ __forceinline__ void add_scaled(float4& to, float factor, const float4& of) {
  to.x = fmaf(factor, of.x, to.x), to.y = fmaf(factor, of.y, to.y);
  to.z = fmaf(factor, of.z, to.z), to.w = fmaf(factor, of.w, to.w);
}

// Parameters: the token's q and k (key heads, DIM) and v (value heads, DIM) before the convolution, one after the
// other; z (value heads, DIM), the gate; b and a (value heads,); all 16-bit. inputs, the last four of each channel,
// 16-bit (channels, 4); state fp32 (value heads, DIM of keys, DIM of values); both are updated. fp32: the convolution
// (channels, 4), decays and biases (value heads,), the norm's weight (DIM,). counters, 0, one for each key head. x
// 16-bit (value heads * DIM,), or null; codes and steps, as q6k_quantize writes them, or null; the norm's epsilon;
// key heads; tiled: the outputs of the heads that share a key are apart by `key_heads`, else neighbours.
// Grid: value heads, a multiple of the key heads.
extern "C" __global__ void __launch_bounds__(THREADS)
    q6k_delta(const u16* mixed, const u16* z, const u16* b, const u16* a, u16* inputs, float* state,
              const float* convolution, const float* decays, const float* biases, const float* norm, u32* counters,
              u16* x, u8* codes, float* steps, float epsilon, int key_heads, int tiled) {
  __shared__ float vectors[3][DIM], squares[2 * PARTS], squares_of_output[PARTS], gates[2];
  __shared__ __align__(16) float partial[WARPS][DIM], deltas[DIM];
  __shared__ __align__(16) u16 staged[DIM];
  __shared__ bool last;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int head = blockIdx.x, sharing = gridDim.x / key_heads, key = head / sharing;

  // One channel of q, k or v for each of the first threads.
  const int part = thread / DIM, column = thread % DIM;
  const bool has_channel = part < 3;
  const int row = part == 0 ? key : part == 1 ? key_heads + key : 2 * key_heads + head;
  const i64 channel = has_channel ? (i64)row * DIM + column : 0;
  uint2* const own_inputs = reinterpret_cast<uint2*>(inputs) + channel;
  const uint2 before = *own_inputs;
  const float4 weights = reinterpret_cast<const float4*>(convolution)[channel];
  const float decay = decays[head], bias = biases[head], norm_weight = norm[column];
  float4 rows[ROWS];
  float4* const own_rows = reinterpret_cast<float4*>(state + ((i64)head * DIM + warp * ROWS) * DIM) + lane;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) rows[i] = own_rows[i * (DIM / 4)];

  wait_for_previous_grid();
  uint2 after = make_uint2(0, 0);
  float gate = 0.0f;
  if (thread < DIM) gate = half_to_float(z[head * DIM + thread]);
  if (has_channel) {
    const u32 now = mixed[channel];
    after = make_uint2(__byte_perm(before.x, before.y, 0x5432), before.y >> 16 | now << 16);
    float sum = weights.x * half_to_float(before.x >> 16);
    sum = fmaf(weights.y, half_to_float(before.y & 0xFFFFu), sum);
    sum = fmaf(weights.z, half_to_float(before.y >> 16), sum);
    sum = fmaf(weights.w, half_to_float(now), sum);
    const float value = rounded(silu(rounded(sum)));
    vectors[part][column] = value;
    const float square = sum_of_warp(value * value);
    if (part < 2 && lane == 0) squares[warp] = square;
    if (part == 2) *own_inputs = after;
  } else if (thread == 3 * DIM) {
    const float shifted = half_to_float(a[head]) + bias;
    gates[0] = expf(decay * (shifted > 20.0f ? shifted : log1pf(expf(shifted))));
    gates[1] = rounded(1.0f / (1.0f + expf(-half_to_float(b[head]))));
  }
  let_dependents_start();
  __syncthreads();

  // The last of the blocks that share a key head stores its inputs, which all have read by then.
  if (thread == 0) {
    u32 others;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(others) : "l"(counters + key) : "memory");
    last = others == sharing - 1;
    if (last) counters[key] = 0;  // for the next launch
  }
  const float of_keys = 1.0f / sqrtf(sum_of_parts(squares + PARTS) + L2_EPSILON);
  const float of_queries = 1.0f / sqrtf(sum_of_parts(squares) + L2_EPSILON) / sqrtf((float)DIM);
  const float kept = gates[0];
  float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    rows[i] = make_float4(rows[i].x * kept, rows[i].y * kept, rows[i].z * kept, rows[i].w * kept);
    add_scaled(sums, vectors[1][warp * ROWS + i] * of_keys, rows[i]);
  }
  reinterpret_cast<float4*>(partial[warp])[lane] = sums;
  __syncthreads();
  if (part < 2 && last) *own_inputs = after;
  if (thread < DIM) {
    float known = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) known += partial[w][thread];
    deltas[thread] = (vectors[2][thread] - known) * gates[1];
  }
  __syncthreads();
  const float4 delta = reinterpret_cast<const float4*>(deltas)[lane];
  sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    add_scaled(rows[i], vectors[1][warp * ROWS + i] * of_keys, delta);
    add_scaled(sums, vectors[0][warp * ROWS + i] * of_queries, rows[i]);
    own_rows[i * (DIM / 4)] = rows[i];
  }
  reinterpret_cast<float4*>(partial[warp])[lane] = sums;
  __syncthreads();

  float output = 0.0f;
  if (thread < DIM) {
#pragma unroll
    for (int w = 0; w < WARPS; ++w) output += partial[w][thread];
    output = rounded(output);
    const float square = sum_of_warp(output * output);
    if (lane == 0) squares_of_output[warp] = square;
  }
  __syncthreads();
  if (thread < DIM) {
    const float inverse = 1.0f / sqrtf(sum_of_parts(squares_of_output) / DIM + epsilon);
    staged[thread] = to_half(rounded(norm_weight * rounded(output * inverse)) * silu(gate));
  }
  __syncthreads();
  if (warp > 0) return;
  const int at = (tiled ? head % sharing * key_heads + key : head) * DIM;
  const bool quantises = lane < DIM / 16;
  uint4 raw[2] = {};
  if (quantises) {
    raw[0] = reinterpret_cast<const uint4*>(staged)[lane * 2];
    raw[1] = reinterpret_cast<const uint4*>(staged)[lane * 2 + 1];
    if (x != nullptr) {
      reinterpret_cast<uint4*>(x + at)[lane * 2] = raw[0];
      reinterpret_cast<uint4*>(x + at)[lane * 2 + 1] = raw[1];
    }
  }
  if (codes == nullptr) return;
  const int k = (int)gridDim.x * DIM;
  const Quantized to = Quantized::all(codes, steps, k);
  quantize_into(to, raw, 0, at / 16 + lane, quantises);
  if (head == (int)gridDim.x - 1) quantize_padding(to, k);
}

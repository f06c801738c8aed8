// A gated delta net for a chunk of a prompt, in three launches: what each token brings, the tokens one after the other,
// and their outputs. Rounded where delta.cuh rounds. fours.cuh comes before this file.
//
// Tokens depend on each other by the state alone, whose columns do not. So a block has 32 columns of a head's state in
// registers and goes through all tokens. With q S' = decay q S + (q k) change, where S' is the state after a token, both
// products with the state are of the one before, and their sums over lanes are under way together.

constexpr int DIM = 128;  // of keys and values
constexpr int WARPS = 8;  // of a block that is not of columns
constexpr int RUN = 8;    // tokens of a warp, whose convolutions share what they see
constexpr int COLUMNS = 32, COLUMN_THREADS = 128;
constexpr int SHARING = 8;            // lanes that share columns: each has 4 of every 32 rows
constexpr int ROWS = DIM / SHARING;   // of the state, in a thread
constexpr int TILE = 16;              // tokens that are copied together
constexpr float L2_EPSILON = 1e-6f;

__device__ __forceinline__ float silu(float value) { return value / (1.0f + expf(-value)); }

__device__ __forceinline__ void load_4(const u16* from, float (&values)[4]) {
  to_floats(*reinterpret_cast<const uint2*>(from), values);
}

// The convolution of four channels, token after token.
struct Channels {
  const u16* mixed;
  const u16* before;  // (channels, 4)
  i64 stride;
  int channel;
  float weights[4][4], seen[3][4];  // of each channel; the last three tokens

  __device__ __forceinline__ void load(int token, float (&values)[4]) const {
    if (token >= 0) return load_4(mixed + token * stride + channel, values);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = half_to_float(before[(channel + j) * 4 + 4 + token]);
  }

  __device__ __forceinline__ void begin(const float* convolution, int token) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 four = reinterpret_cast<const float4*>(convolution)[channel + j];
      weights[j][0] = four.x, weights[j][1] = four.y, weights[j][2] = four.z, weights[j][3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) load(token - 3 + i, seen[i]);
  }

  __device__ __forceinline__ void next(int token, float (&values)[4]) {
    float now[4];
    load(token, now);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float sum = weights[j][0] * seen[0][j];
      sum = fmaf(weights[j][1], seen[1][j], sum);
      sum = fmaf(weights[j][2], seen[2][j], sum);
      sum = fmaf(weights[j][3], now[j], sum);
      values[j] = rounded(silu(rounded(sum)));
      seen[0][j] = seen[1][j], seen[1][j] = seen[2][j], seen[2][j] = now[j];
    }
  }
};

__device__ __forceinline__ float norm_of(const float (&values)[4]) {
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) squares = fmaf(values[j], values[j], squares);
  return 1.0f / sqrtf(sum_of_warp(squares) + L2_EPSILON);
}

// Parameters: mixed, each token's q and k (key heads, DIM) and v (value heads, DIM) before the convolution, 16-bit, rows
// `stride` apart; b and a, 16-bit (tokens, value heads), rows `b_stride` and `a_stride` apart; inputs, the last four of
// each channel before the chunk, 16-bit (channels, 4); fp32: the convolution (channels, 4), decays and biases (value
// heads,). To: q and k, normed, q also scaled, fp32 (key heads, tokens, DIM); v 16-bit (value heads, tokens, DIM); gates
// fp32 (value heads, tokens, 4): the decay, the rate, the product of q and k. tokens; key heads; value heads.
// Grid: RUN tokens x (key heads + value heads) / WARPS.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    q6k_delta_inputs(const u16* mixed, const u16* b, const u16* a, i64 stride, i64 b_stride, i64 a_stride,
                     const u16* inputs, const float* convolution, const float* decays, const float* biases, float* q,
                     float* k, u16* v, float* gates, int tokens, int key_heads, int value_heads) {
  const int lane = threadIdx.x & 31, head = blockIdx.y * WARPS + (threadIdx.x >> 5), value_head = head - key_heads;
  const int begin = blockIdx.x * RUN, end = min(begin + RUN, tokens), sharing = value_heads / key_heads;
  let_dependents_start();
  wait_for_previous_grid();
  if (value_head >= value_heads) return;
  float found[4];
  if (value_head >= 0) {
    Channels of_v = {mixed, inputs, stride, (2 * key_heads + value_head) * DIM + 4 * lane};
    of_v.begin(convolution, begin);
    for (int token = begin; token < end; ++token) {
      const i64 at = (i64)value_head * tokens + token;
      of_v.next(token, found);
      *reinterpret_cast<uint2*>(v + at * DIM + 4 * lane) = to_halves(found);
      if (lane == 0) {
        const float shifted = half_to_float(a[token * a_stride + value_head]) + biases[value_head];
        gates[at * 4] = expf(decays[value_head] * (shifted > 20.0f ? shifted : log1pf(expf(shifted))));
        gates[at * 4 + 1] = rounded(1.0f / (1.0f + expf(-half_to_float(b[token * b_stride + value_head]))));
      }
    }
    return;
  }
  Channels of_q = {mixed, inputs, stride, head * DIM + 4 * lane};
  Channels of_k = {mixed, inputs, stride, (key_heads + head) * DIM + 4 * lane};
  of_q.begin(convolution, begin), of_k.begin(convolution, begin);
  for (int token = begin; token < end; ++token) {
    float other[4], product = 0.0f;
    of_q.next(token, found), of_k.next(token, other);
    const float of_queries = norm_of(found) / sqrtf((float)DIM), of_keys = norm_of(other);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      found[j] *= of_queries, other[j] *= of_keys;
      product = fmaf(found[j], other[j], product);
    }
    product = sum_of_warp(product);
    const i64 at = ((i64)head * tokens + token) * DIM + 4 * lane;
    *reinterpret_cast<float4*>(q + at) = make_float4(found[0], found[1], found[2], found[3]);
    *reinterpret_cast<float4*>(k + at) = make_float4(other[0], other[1], other[2], other[3]);
    for (int i = lane; i < sharing; i += 32) gates[((i64)(head * sharing + i) * tokens + token) * 4 + 2] = product;
  }
}

// Parameters: q, k, v, gates, as q6k_delta_inputs writes them; state fp32 (value heads, DIM of keys, DIM of values), which
// is updated; out 16-bit (tokens, value heads, DIM); tokens; key heads. Grid: value heads x (DIM / COLUMNS).
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS)
    q6k_delta_tokens(const float* q, const float* k, const u16* v, const float* gates, float* state, u16* out,
                     int tokens, int key_heads) {
  __shared__ __align__(16) float queries[2][TILE][DIM], keys[2][TILE][DIM], of_tokens[2][TILE][4];
  __shared__ __align__(16) u16 values[2][TILE][COLUMNS];
  const int thread = threadIdx.x, part = thread % SHARING, pair = thread / SHARING;
  const int value_heads = gridDim.x, head = blockIdx.x, first = blockIdx.y * COLUMNS;
  const i64 of_keys = (i64)(head / (value_heads / key_heads)) * tokens, of_values = (i64)head * tokens;
  let_dependents_start();
  wait_for_previous_grid();
  auto copy = [&](int tile) {
    const int begin = tile * TILE, count = min(TILE, tokens - begin), slot = tile & 1;
    for (int at = thread; at < count * (DIM / 4); at += COLUMN_THREADS) {
      const i64 from = (of_keys + begin) * DIM + at * 4;
      copy_async_16(shared_address(&queries[slot][0][0] + at * 4), q + from);
      copy_async_16(shared_address(&keys[slot][0][0] + at * 4), k + from);
    }
    for (int at = thread; at < count * (COLUMNS / 8); at += COLUMN_THREADS) {
      const int row = at / (COLUMNS / 8), inside = at % (COLUMNS / 8) * 8;
      copy_async_16(shared_address(&values[slot][row][inside]), v + (of_values + begin + row) * DIM + first + inside);
    }
    for (int at = thread; at < count; at += COLUMN_THREADS) {
      copy_async_16(shared_address(of_tokens[slot][at]), gates + (of_values + begin + at) * 4);
    }
    commit_copies();
  };
  copy(0);
  float rows[ROWS][2];
  float* const own = state + (i64)head * DIM * DIM + first + 2 * pair;
  auto row_of = [&](int i) { return (i / 4 * SHARING + part) * 4 + i % 4; };
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const float2 two = *reinterpret_cast<const float2*>(own + row_of(i) * DIM);
    rows[i][0] = two.x, rows[i][1] = two.y;
  }
  const int tiles = (tokens + TILE - 1) / TILE;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) copy(tile + 1);
    else commit_copies();
    wait_copies<1>();
    __syncthreads();
    const int slot = tile & 1, count = min(TILE, tokens - tile * TILE);
    for (int token = 0; token < count; ++token) {
      float key[ROWS], sums[4] = {};  // k S of both columns, then q S
#pragma unroll
      for (int i = 0; i < ROWS; i += 4) {
        const float4 of_k = *reinterpret_cast<const float4*>(&keys[slot][token][row_of(i)]);
        const float4 of_q = *reinterpret_cast<const float4*>(&queries[slot][token][row_of(i)]);
        const float query[4] = {of_q.x, of_q.y, of_q.z, of_q.w};
        key[i] = of_k.x, key[i + 1] = of_k.y, key[i + 2] = of_k.z, key[i + 3] = of_k.w;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            sums[c] = fmaf(key[i + j], rows[i + j][c], sums[c]);
            sums[2 + c] = fmaf(query[j], rows[i + j][c], sums[2 + c]);
          }
        }
      }
#pragma unroll
      for (int apart = 1; apart < SHARING; apart <<= 1) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[c] += __shfl_xor_sync(0xFFFFFFFFu, sums[c], apart);
      }
      const float4 gate = *reinterpret_cast<const float4*>(of_tokens[slot][token]);
      const u32 both = *reinterpret_cast<const u32*>(&values[slot][token][2 * pair]);
      float found[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float change = (half_to_float(c ? both >> 16 : both & 0xFFFFu) - gate.x * sums[c]) * gate.y;
        found[c] = fmaf(gate.x, sums[2 + c], gate.z * change);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) rows[i][c] = fmaf(rows[i][c], gate.x, key[i] * change);
      }
      if (part == 0) {
        const i64 at = ((i64)(tile * TILE + token) * value_heads + head) * DIM + first + 2 * pair;
        *reinterpret_cast<u32*>(out + at) = pack_halves(found[0], found[1]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    *reinterpret_cast<float2*>(own + row_of(i) * DIM) = make_float2(rows[i][0], rows[i][1]);
  }
}

// x = the norm of the outputs times the gate's sigmoid linear unit.
//
// Parameters: out, as q6k_delta_tokens writes it; z 16-bit (tokens, value heads * DIM), rows `stride` apart; the norm's
// weight fp32 (DIM,); x 16-bit (tokens, value heads * DIM); the norm's epsilon; value heads; key heads; tiled: the outputs
// of the heads that share a key are apart by `key_heads`, else neighbours. Grid: tokens x value heads / WARPS.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    q6k_delta_outputs(const u16* out, const u16* z, i64 stride, const float* norm, u16* x, float epsilon,
                      int value_heads, int key_heads, int tiled) {
  const int lane = threadIdx.x & 31, head = blockIdx.y * WARPS + (threadIdx.x >> 5), sharing = value_heads / key_heads;
  let_dependents_start();
  wait_for_previous_grid();
  if (head >= value_heads) return;
  float found[4], gates[4], squares = 0.0f;
  const i64 token = (i64)blockIdx.x * value_heads;
  load_4(out + (token + head) * DIM + 4 * lane, found);
  load_4(z + blockIdx.x * stride + head * DIM + 4 * lane, gates);
  const float4 weight = reinterpret_cast<const float4*>(norm)[lane];
  const float weights[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) squares = fmaf(found[j], found[j], squares);
  const float inverse = 1.0f / sqrtf(sum_of_warp(squares) / DIM + epsilon);
#pragma unroll
  for (int j = 0; j < 4; ++j) found[j] = rounded(weights[j] * rounded(found[j] * inverse)) * silu(gates[j]);
  const int to = tiled ? head % sharing * key_heads + head / sharing : head;
  *reinterpret_cast<uint2*>(x + (token + to) * DIM + 4 * lane) = to_halves(found);
}

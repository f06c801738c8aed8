// A decoding step of a whole model in one kernel: one block on each multiprocessor, all of which run to the end.
//
// The schedule is a list of rows, a product or attention each. A block multiplies its part of the rows of every product
// and publishes the outputs as words (words.cuh). What a product multiplies every block computes for itself, from the
// words of all: the residual sum and its norm, or values. So between two products nothing waits but for data, and
// meanwhile the ring of tiles fills with what comes next.
//
// Nobody waits for a block that does not run: the launch is cooperative. Two sets of words in turn are enough, as no
// block begins a layer before all have read the one before the last: `generate/schedule.py` sees to it.

static_assert(TOKENS == 1 && !Q6K_FUSED, "a step is of one token");

struct Given {
  const Row* schedule;
  const u16* hidden;    // the token's embedding
  const i64* position;  // of the token
  u32* epoch;           // the number of earlier steps, which is counted up
  u64* trace;           // (rows, blocks, TIMES): when a block does what in a row, in ns; or null
  int count, hidden_size;
  int activation_bytes;  // of the longest row of activations, in shared memory
};

constexpr int TILE_SUMS = TILE_ROWS * WARPS;  // of a row tile: (warp, row)
constexpr int NORM_ROUNDS = Q6K_NORM_ROUNDS;  // pieces of eight values that a thread has of the residual stream

// Shared memory of a block, by address. `work` serves one row at a time: activations and then sums of row tiles, or
// attention.
struct Room {
  u8* residual;  // 16-bit (hidden,)
  float* sums;   // two for each warp
  volatile int* reading;  // the row that is multiplied
  u8* work;
  float* tile_sums;

  __device__ __forceinline__ static Room of(u8* shared, const Given& given) {
    u8* const residual = shared + Ring::END;
    float* const sums = reinterpret_cast<float*>(residual + (given.hidden_size * 2 + 15) / 16 * 16);
    u8* const work = reinterpret_cast<u8*>(sums + 2 * WARPS + 4);
    volatile int* const reading = reinterpret_cast<volatile int*>(sums + 2 * WARPS);
    return {residual, sums, reading, work, reinterpret_cast<float*>(work + given.activation_bytes)};
  }
};

// Over all threads that multiply, in one order; `parts` is for this sum alone.
__device__ __forceinline__ float block_sum(float value, float* parts) {
  value = sum_of_warp(value);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = value;
  meet();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w += 4) {
    const uint4 four = load_shared_16(shared_address(parts + w));
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += __uint_as_float(word_of(four, i));
  }
  return sum;
}

// Where the activations of a row of k values lie in `work`.
__device__ __forceinline__ Quantized activations_at(u8* work, int k) {
  return Quantized::all(work, reinterpret_cast<float*>(work + super_blocks_of(k) * CODES_A_BLOCK), k);
}

__device__ __forceinline__ void to_floats(const uint2& low, const uint2& high, float (&values)[8]) {
  to_floats(make_uint4(low.x, low.y, high.x, high.y), values);
}

__device__ __forceinline__ void round_8(float (&values)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = rounded(values[j]);
}

__device__ __forceinline__ float sum_of_squares(const float (&values)[NORM_ROUNDS][8]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < NORM_ROUNDS; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(values[i][j], values[i][j], sum);
  }
  return sum;
}

// Calls each(i, eight) for a thread's pieces of eight of `count` in the row; warps stay together.
template <typename Each>
__device__ __forceinline__ void for_eights(int count, Each each) {
#pragma unroll
  for (int i = 0; i < NORM_ROUNDS; ++i) {
    const int eight = threadIdx.x + i * THREADS;
    if ((eight & ~31) < count) each(i, eight);
  }
}

// The residual sum with the values of other blocks, or with none in the first row, its norm, and its quantisation.
__device__ __forceinline__ void take_norm(const Row& row, const u16* hidden, u32 expected, const Room& room,
                                          const Quantized& to, u64* times) {
  const int eights = row.k / 8, padded = padded_groups(row.k) * 2;
  u16* const residual = reinterpret_cast<u16*>(room.residual);
  float weights[NORM_ROUNDS][8] = {}, of_delta[NORM_ROUNDS][8] = {}, sum[NORM_ROUNDS][8] = {};
  float delta[NORM_ROUNDS][8] = {};
  const bool normed = row.after != nullptr, first = row.input == nullptr;
  for_eights(eights, [&](int i, int eight) {
    if (eight >= eights) return;
    load_factors(row.weight + eight * 8, weights[i]);
    if (normed) load_factors(row.after + eight * 8, of_delta[i]);
    load_8(first ? hidden + eight * 8 : residual + eight * 8, sum[i]);
  });
  if (!first) {
    uint2 pairs[2 * NORM_ROUNDS];
    auto at = [&](int i) -> const u32* {
      const int eight = threadIdx.x + i / 2 * THREADS;
      return eight < eights ? row.input + eight * 8 + i % 2 * 4 : nullptr;
    };
    await_words(at, expected, pairs);
#pragma unroll
    for (int i = 0; i < NORM_ROUNDS; ++i) to_floats(pairs[2 * i], pairs[2 * i + 1], delta[i]);
    note_time(times, 1);
    float inverse = 1.0f;
    if (normed) inverse = rsqrtf(block_sum(sum_of_squares(delta), room.sums) / (float)row.k + row.epsilon);
#pragma unroll
    for (int i = 0; i < NORM_ROUNDS; ++i) {
      if (normed) {
#pragma unroll
        for (int j = 0; j < 8; ++j) delta[i][j] *= inverse * of_delta[i][j];
        round_8(delta[i]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(delta[i][j], row.factor, sum[i][j]);
      round_8(sum[i]);
      if (row.scale != 1.0f) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] *= row.scale;
        round_8(sum[i]);
      }
    }
  }
  for_eights(eights, [&](int i, int eight) {
    if (eight < eights) store_8(residual + eight * 8, sum[i]);
  });
  const float squares = block_sum(sum_of_squares(sum), room.sums + WARPS);
  const float inverse = rsqrtf(squares / (float)row.k + row.epsilon);
  for_eights(padded, [&](int i, int eight) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[i][j] *= inverse * weights[i][j];
    round_8(sum[i]);
    quantize_eight_into(to, sum[i], eight, eight < padded);
  });
}

// The quantisation of the values of other blocks: up to four pieces of eight of a thread are under way at once.
__device__ __forceinline__ void take_values(const Row& row, u32 expected, const Quantized& to) {
  constexpr int PIECES = 4;
  const int eights = row.k / 8, padded = padded_groups(row.k) * 2;
  for (int begin = threadIdx.x; (begin & ~31) < padded; begin += PIECES * THREADS) {
    uint2 pairs[2 * PIECES];
    auto at = [&](int i) -> const u32* {
      const int eight = begin + i / 2 * THREADS;
      return eight < eights ? row.input + eight * 8 + i % 2 * 4 : nullptr;
    };
    await_words(at, expected, pairs);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int eight = begin + i * THREADS;
      if ((eight & ~31) >= padded) break;
      float values[8];
      to_floats(pairs[2 * i], pairs[2 * i + 1], values);  // zeros past the row
      quantize_eight_into(to, values, eight, eight < padded);
    }
  }
}

// Multiplies the tiles of a warp; its sums of a row tile go to their place among those of all warps.
template <typename Tile, typename Multiply>
__device__ __forceinline__ void multiply_part(Reader& reader, const Part& part, int lane, int warp, float* tile_sums,
                                              const ActivationParts& own, Multiply multiply) {
  float totals[2][COLUMNS] = {};
  const int count = part.count();
  int row_tile = 0, block = warp;
  auto wrap = [&]() {
    while (block >= part.depth) block -= part.depth, ++row_tile;
  };
  wrap();
#pragma unroll 1
  for (int at = warp; at < (count + WARPS - 1) / WARPS * WARPS; at += WARPS) {
    const u32 place = reader.wait(warp);
    if (at >= count) {  // a round in which the warp has no tile; it must not run ahead of who requests them
      reader.release(warp, lane);
      break;
    }
    Tile tile;
    tile.load(place, lane);
    __syncwarp();
    reader.release(warp, lane);
    multiply(totals, tile, own.codes + block * CODES_A_BLOCK, own.steps + block * STEPS_A_BLOCK,
             own.sums + block * STEPS_A_BLOCK, own.parts + block * PARTS_A_BLOCK);
    const int done = row_tile;
    block += WARPS;
    wrap();
    if (row_tile == done && at + WARPS < count) continue;
    add_lanes(totals);
    if ((lane & 3) == 0) {
      float* const to = tile_sums + done * TILE_SUMS + warp * TILE_ROWS + (lane >> 2);
      to[0] = totals[0][0], to[8] = totals[1][0];
    }
    totals[0][0] = totals[1][0] = 0.0f;
  }
}

// An output of this block's part: the sum over warps of a row of a row tile, with the bias, in 16 bits.
__device__ __forceinline__ u16 output_of(const Row& row, const Part& part, const float* tile_sums, int row_tile,
                                         int inside, int at) {
  const float* const from = tile_sums + row_tile * TILE_SUMS + inside;
  const int first = row_tile * part.depth;  // the row tile's first tile, which is warp first % WARPS'
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    if (part.depth >= WARPS || (w - first & WARPS - 1) < part.depth) sum += from[w * TILE_ROWS];
  }
  return to_half(sum + bias_at(row.bias, row.bias_kind, at));
}

// The outputs of this block's part, once all warps have multiplied.
__device__ __forceinline__ void put_outputs(const Row& row, const Part& part, const float* tile_sums, u32 tag) {
  if (row.result == GATED) {
    const int width = row.n / 2;
    for (int i = threadIdx.x; i < part.tiles / 2 * TILE_ROWS; i += THREADS) {
      const int pair = i / TILE_ROWS * 2, inside = i % TILE_ROWS, at = part.first / 2 * TILE_ROWS + i;
      if (at >= width) break;
      const float gate = half_to_float(output_of(row, part, tile_sums, pair, inside, at));
      const float up = half_to_float(output_of(row, part, tile_sums, pair + 1, inside, width + at));
      publish(static_cast<u32*>(row.output) + at, to_half(activated(row.gate, gate) * up), tag);
    }
    return;
  }
  for (int i = threadIdx.x; i < part.tiles * TILE_ROWS; i += THREADS) {
    const int at = part.first * TILE_ROWS + i;
    if (at >= row.n) break;
    const u16 value = output_of(row, part, tile_sums, i / TILE_ROWS, i % TILE_ROWS, at);
    if (row.result == MEMORY) {
      static_cast<u16*>(row.output)[at] = value;
    } else {
      publish(static_cast<u32*>(row.output) + at, value, tag);
    }
  }
}

__device__ __forceinline__ void process_product(const Row& row, const u16* hidden, u32 base, const Room& room,
                                                Reader& reader, int at, u64* times) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Quantized quantized = activations_at(room.work, row.k);
  const u32 expected = base + row.expects & 0xFFFFu;
  if (row.source == NORM) take_norm(row, hidden, expected, room, quantized, times);
  if (row.source == VALUES) take_values(row, expected, quantized);
  note_time(times, 2);
  meet();
  note_time(times, 3);
  if (threadIdx.x == 0) *room.reading = at;
  const Part part = Part::of(row);
  const ActivationParts activations = {shared_address(quantized.codes), shared_address(quantized.steps),
                                   shared_address(quantized.sums), shared_address(quantized.parts)};
  if (Q6K_TYPES == 2 && row.type) {
    multiply_part<second::LaneTile>(reader, part, lane, warp, room.tile_sums, second::of_lane(activations, lane),
                                    [](float(&totals)[2][COLUMNS], const second::LaneTile& tile, u32 codes, u32 steps,
                                       u32 sums, u32 parts) {
                                      second::multiply_tile(totals, tile, codes, steps, sums, parts);
                                    });
  } else {
    multiply_part<LaneTile>(reader, part, lane, warp, room.tile_sums, of_lane(activations, lane),
                            [](float(&totals)[2][COLUMNS], const LaneTile& tile, u32 codes, u32 steps, u32 sums,
                               u32 parts) { multiply_tile(totals, tile, codes, steps, sums, parts); });
  }
  note_time(times, 4);
  meet();
  note_time(times, 5);
  put_outputs(row, part, room.tile_sums, base + row.tag & 0xFFFFu);
}

// One parameter, as cooperative launches in graphs want it. Grid: at most one block a multiprocessor, all at once. Shared
// memory: `generate/schedule.py` has the size.
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) q6k_persist(Given given) {
  const int count = given.count, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u8* const shared = Ring::shared();
  const Room room = Room::of(shared, given);
  Row* const rows = reinterpret_cast<Row*>(shared + Ring::ROWS_AT);
  auto load_row = [&](int at) {
    constexpr int PIECES = sizeof(Row) / 16;
    if (at >= count || lane >= PIECES) return;
    reinterpret_cast<uint4*>(rows + at % CACHED_ROWS)[lane] = reinterpret_cast<const uint4*>(given.schedule + at)[lane];
  };
  if (threadIdx.x == 0) Ring::init(), *room.reading = 0;
  if (warp < AHEAD) load_row(warp);
  const u32 step = *given.epoch, base = step * (u32)count;
  __syncthreads();
  if (warp >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW_REGISTERS));
    if (threadIdx.x == THREADS) request_tiles(given.schedule, count, room.reading);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY_REGISTERS));
  const i64 here = *given.position;
  Reader reader;
  for (int at = 0; at < count; ++at) {
    if (warp == WARPS - 1) load_row(at + AHEAD);
    const Row& row = rows[at % CACHED_ROWS];
    u64* const times = given.trace == nullptr ? nullptr : given.trace + ((i64)at * gridDim.x + blockIdx.x) * TIMES;
    note_time(times, 0);
    if (row.kind == ATTENTION) {
      process_attention(row, here, base, room.work, times);
    } else {
      process_product(row, given.hidden, base, room, reader, at, times);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *given.epoch = step + 1;
}

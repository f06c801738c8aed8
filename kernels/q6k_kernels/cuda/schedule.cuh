}  // namespace second

// What a persistent kernel reads: the rows of its schedule, in order, and the tiles of weights, which come to a ring ahead
// of the row that is multiplied.
//
//   Q6K_WARPS, Q6K_STAGES   see warps.cuh, which comes before this file
//   Q6K_PENDING             chunks of tiles that are under way at a time for later rows
//   Q6K_TYPES               1, or 2 if some rows have the second type

enum RowKind { PRODUCT = 0, ATTENTION = 1 };
// What a product multiplies: the norm of the residual sum, values of other blocks, or what the row before had.
enum Source { NORM = 0, VALUES = 1, SAME = 2 };
// What becomes of its outputs: words for other blocks, those of gates and what they gate, or 16-bit values in memory.
enum Output { WORDS = 0, GATED = 1, MEMORY = 2 };

// `generate/schedule.py` writes it and says what each field is.
struct __align__(16) Row {
  const u8* tiles;
  const void* bias;
  const u32 *input, *of_keys, *of_values;
  void* output;
  const float *after, *weight;
  u16 *keys, *values;
  const float *cosines, *sines, *q_norm, *k_norm, *growth;
  u64* partials;
  float factor, scale, epsilon, softcap;
  int kind, source, result, gate, type, bias_kind;
  int k, n, row_tiles, begin, total, expects, tag;
  int slots, window, heads, group, splits, rotated, values_normed;
};

static_assert(sizeof(Row) == 224, "as the host packs it");

constexpr int CACHED_ROWS = 8;  // in shared memory: those around the one that is processed
constexpr int AHEAD = 4;        // rows in shared memory after it
constexpr int PENDING = Q6K_PENDING;
constexpr int ALL_THREADS = THREADS + 128;  // and four warps, one of which requests tiles: registers go by four warps
// Of a thread: those of the launch, of a warp that requests tiles, of one that multiplies. What one gives the others take.
constexpr int REGISTERS = 96, FEW_REGISTERS = 32, MANY_REGISTERS = 112;
static_assert(128 * (REGISTERS - FEW_REGISTERS) >= THREADS * (MANY_REGISTERS - REGISTERS), "else they wait for ever");
constexpr int SECOND_BYTES = Q6K_TYPES == 2 ? second::TILE_BYTES : 0;
constexpr int STAGE_BYTES = TILE_BYTES > SECOND_BYTES ? TILE_BYTES : SECOND_BYTES;

// A barrier of the warps that multiply.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Copies tiles that lie one after the other, each to a place of STAGE_BYTES.
__device__ __forceinline__ void copy_tiles(u32 to, const u8* from, int count, u32 bytes, u32 barrier) {
  if (bytes == STAGE_BYTES) {
    copy_bulk(to, from, count * bytes, barrier, evict_first());
    return;
  }
  for (int i = 0; i < count; ++i) copy_bulk(to + i * STAGE_BYTES, from + i * bytes, bytes, barrier, evict_first());
}

// The row tiles of a row that this block has: `tiles` from `first` on, each `depth` super-blocks. With gates a row tile of
// gates is followed by that of what they gate.
struct Part {
  int first, tiles, depth;

  // Rows that share their input share the blocks: together they have `total` units, this one's begin at `row.begin`.
  __device__ __forceinline__ static Part of(const Row& row) {
    const int unit = row.result == GATED ? 2 : 1, units = row.row_tiles / unit;
    const int first = share(row.total, blockIdx.x, gridDim.x) - row.begin;
    const int last = share(row.total, blockIdx.x + 1, gridDim.x) - row.begin;
    const int from = min(max(first, 0), units), to = min(max(last, 0), units);
    return {from * unit, (to - from) * unit, super_blocks_of(row.k)};
  }

  __device__ __forceinline__ int count() const { return tiles * depth; }
  __device__ __forceinline__ int rounds() const { return (count() + WARPS - 1) / WARPS; }
};

// The ring of tiles of a block. The tiles of its part of a row come in rounds, one for each warp. A stage holds a round, in
// chunks that are copied, waited for and given back as a whole.
struct Ring {
  static constexpr int CHUNK = 4, CHUNKS = WARPS / CHUNK;  // tiles of a chunk, chunks of a round
  static constexpr int BARRIERS_AT = WARPS * STAGES * STAGE_BYTES, BARRIERS = 2 * STAGES * CHUNKS + 1;
  static constexpr int ROWS_AT = BARRIERS_AT + (BARRIERS * 8 + 15) / 16 * 16;
  static constexpr int END = ROWS_AT + CACHED_ROWS * (int)sizeof(Row);

  __device__ __forceinline__ static u8* shared() {
    extern __shared__ __align__(128) u8 all_shared[];
    return all_shared;
  }
  __device__ __forceinline__ static u32 at(int stage, int tile) {
    return shared_address(shared()) + (stage * WARPS + tile) * STAGE_BYTES;
  }
  __device__ __forceinline__ static u32 barrier(int which) { return shared_address(shared()) + BARRIERS_AT + which * 8; }
  __device__ __forceinline__ static u32 full(int stage, int chunk) { return barrier(stage * CHUNKS + chunk); }
  __device__ __forceinline__ static u32 free(int stage, int chunk) { return barrier((STAGES + stage) * CHUNKS + chunk); }
  // Once the keys and values of a row of attention are requested.
  __device__ __forceinline__ static u32 attended() { return barrier(2 * STAGES * CHUNKS); }

  // By one thread; then the block meets.
  __device__ __forceinline__ static void init() {
    for (int i = 0; i < STAGES * CHUNKS; ++i) {
      barrier_init(barrier(i), 1);
      barrier_init(barrier(STAGES * CHUNKS + i), CHUNK);
    }
    barrier_init(attended(), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
};

// A place in the ring: a stage, and the parity of its barriers' phase.
struct Place {
  int stage = 0;
  u32 parity = 0;

  __device__ __forceinline__ void next() {
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

// What a warp that multiplies knows of the ring.
struct Reader {
  Place place;

  // Waits for the warp's tile of the round and returns where it lies.
  __device__ __forceinline__ u32 wait(int warp) const {
    barrier_wait(Ring::full(place.stage, warp / Ring::CHUNK), place.parity);
    return Ring::at(place.stage, warp);
  }

  // Goes on to the next round, once all lanes have read the tile. A warp without one does so, too.
  __device__ __forceinline__ void release(int warp, int lane) {
    if (lane == 0) barrier_arrive(Ring::free(place.stage, warp / Ring::CHUNK));
    place.next();
  }
};

// One thread's work beside the warps that multiply: requests the tiles of all rows, in order, as stages become free. Tiles
// of a later row than the one that is multiplied come without haste: no more than PENDING chunks are under way. What
// blocks hand to each other is read from the same memory, and would wait behind more. `reading` is the row that is
// multiplied.
__device__ __forceinline__ void request_tiles(const Row* row, int count, const volatile int* reading) {
  constexpr int ALL = STAGES * Ring::CHUNKS;
  int which = 0, under_way = 0;  // the chunk of the ring that is next; chunks of later rows, at most, since the last row
  u32 parity = 0, attentions = 0;
  for (int at = 0; at < count; ++at, ++row) {
    if (row->kind == ATTENTION) {
      barrier_wait(Ring::attended(), attentions++ & 1);
      continue;
    }
    const Part part = Part::of(*row);
    const u32 bytes = Q6K_TYPES == 2 && row->type ? SECOND_BYTES : TILE_BYTES;
    const bool gated = row->result == GATED;
    // All tiles of a part lie side by side; but with gates, after each row tile, its other half is the next.
    const i64 other_half = (i64)(row->row_tiles / 2) * part.depth * bytes;
    const u8* from = row->tiles + (i64)(gated ? part.first / 2 : part.first) * part.depth * bytes;
    int left = part.count(), until_other = gated ? part.depth : left;
    bool second_half = false;
    while (left || which % Ring::CHUNKS) {
      const u32 full = Ring::barrier(which);
      barrier_wait(Ring::barrier(ALL + which), parity ^ 1);
      const bool some = left;
      int wanted = min(left, Ring::CHUNK);
      if (wanted && PENDING < ALL && *reading < at) {
        const bool in_last_lap = which < PENDING;
        if (under_way >= PENDING) {
          barrier_wait(Ring::barrier(which - PENDING + (in_last_lap ? ALL : 0)), in_last_lap ? parity ^ 1 : parity);
        }
        ++under_way;
      }
      left -= wanted;
      if (wanted) barrier_expect(full, wanted * bytes);
      u32 to = Ring::at(0, which * Ring::CHUNK);
      while (wanted) {
        const int together = min(wanted, until_other);
        copy_tiles(to, from, together, bytes, full);
        to += together * STAGE_BYTES, from += together * bytes;
        wanted -= together, until_other -= together;
        if (gated && until_other == 0) {
          from += second_half ? -other_half : other_half - (i64)part.depth * bytes;
          second_half = !second_half, until_other = part.depth;
        }
      }
      if (!some) barrier_arrive(full);  // warps without a tile wait for it all the same
      if (++which == ALL) which = 0, parity ^= 1;
    }
  }
}

// Notes the time in nanoseconds, if it is wanted: `which` of the times of a row.
constexpr int TIMES = 6;
__device__ __forceinline__ void note_time(u64* times, int which) {
  if (times != nullptr && threadIdx.x == 0) asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(times[which]));
}

// Attention within a persistent kernel (persist.cuh): the blocks of a row of blocks share the keys of one head. Each
// publishes its sums as words, and then adds those of all for its own part of the outputs.

constexpr int ATTENDING = 8;  // warps of a block that attend
using Attention = AttendBlock<ATTENDING>;

// What attention keeps in `work`.
struct AttendRoom {
  AttendShared<ATTENDING>& shared;
  u16* incoming;  // queries, key and value as they come, (heads + 2, DIM)
  u8* ring;

  __device__ __forceinline__ static AttendRoom of(u8* work) {
    constexpr int SHARED = (sizeof(AttendShared<ATTENDING>) + 15) / 16 * 16, INCOMING = (ATTEND_HEADS + 2) * DIM * 2;
    return {*reinterpret_cast<AttendShared<ATTENDING>*>(work), reinterpret_cast<u16*>(work + SHARED),
            work + SHARED + INCOMING};
  }
};

// Queries, key and value of this block's heads, from the words of other blocks to shared memory.
__device__ __forceinline__ void take_vectors(const Row& row, int first_head, int key_head, u32 expected, u16* to) {
  const int count = (row.heads + 2) * (DIM / 4);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int vector = i / (DIM / 4), inside = i % (DIM / 4) * 4, beyond = vector - row.heads;
    const u32* const from = beyond < 0    ? row.input + (first_head + vector) * DIM
                            : beyond == 0 ? row.of_keys + key_head * DIM
                                          : row.of_values + key_head * DIM;
    uint2 pairs[1];
    await_words([&](int) { return from + inside; }, expected, pairs);
    *reinterpret_cast<uint2*>(to + vector * DIM + inside) = pairs[0];
  }
}

// Norms and rotation of what has come.
__device__ __forceinline__ void turn_vectors(const Row& row, i64 here, const AttendRoom& room, int warp) {
  const HeadForm form = {HEAD, row.rotated, 0, row.epsilon};
  const i64 angles = here * (row.rotated / 2);
  for (int vector = warp; vector <= row.heads; vector += WARPS) {
    const float* const norm = vector < row.heads ? row.q_norm : row.k_norm;
    Rotation rotation;
    rotation.load(norm, row.cosines + angles, row.sines + angles, form);
    rotation.apply(room.incoming + vector * DIM, form, norm != nullptr, OWN,
                   room.shared.queries[vector < row.heads ? vector : ATTEND_HEADS]);
  }
  for (int at = row.heads * DIM + threadIdx.x; at < ATTEND_HEADS * DIM; at += THREADS) {
    room.shared.queries[at / DIM][at % DIM] = 0;
  }
  const u16* const value = room.incoming + (row.heads + 1) * DIM;
  if (!row.values_normed) {
    for (int d = threadIdx.x; d < DIM; d += THREADS) room.shared.own_value[d] = value[d];
  } else if (warp == WARPS - 1) {
    normed_without_weights(value, row.epsilon, room.shared.own_value);
  }
}

// The block's part of the outputs of `size` that its row of blocks has, from the sums of them all, in their order. Half
// a warp has an output, a lane the sums of one block; with more than 16 blocks a warp has it.
__device__ __forceinline__ void join_sums(const Row& row, const u64* sums, int part, int size, int first_output, u32 tag,
                                          int lane, int warp) {
  const int lanes = row.splits <= 16 ? 16 : 32, at_once = 32 / lanes, each = (size + row.splits - 1) / row.splits;
  const int block = lane % lanes, end = min((part + 1) * each, size), words = size + 2 * row.heads;
  for (int first = part * each + warp * at_once; first < end; first += WARPS * at_once) {
    const int output = min(first + lane / lanes, end - 1), head = output / DIM;
    const bool counts = block < row.splits;
    const u64* const from = sums + (i64)(counts ? block : 0) * words;
    float values[3] = {};
    if (counts) await_floats({from + output, from + size + head, from + size + row.heads + head}, tag, values);
    float total = values[0], weight = values[2];
    const float most = counts ? values[1] : minus_infinity();
    float largest = most;
    for (int apart = lanes / 2; apart; apart >>= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, apart));
    }
    const float fade = weight_of(most, largest);
    total *= fade, weight *= fade;
    for (int apart = lanes / 2; apart; apart >>= 1) {
      total += __shfl_xor_sync(0xFFFFFFFFu, total, apart);
      weight += __shfl_xor_sync(0xFFFFFFFFu, weight, apart);
    }
    if (block == 0 && first + lane / lanes < end) {
      publish(static_cast<u32*>(row.output) + first_output + output, to_half(total / weight), tag & 0xFFFFu);
    }
  }
}

__device__ __forceinline__ void process_attention(const Row& row, i64 here, u32 base, u8* work, u64* times) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row_of_blocks = blockIdx.x / row.splits, part = blockIdx.x % row.splits;
  const int first_head = row_of_blocks * row.heads, key_head = first_head / row.group, size = row.heads * DIM;
  if (first_head >= row.n / DIM) {  // no heads for this block
    if (threadIdx.x == 0) barrier_arrive(Ring::attended());
    return;
  }
  const int used = (int)min(here + 1, (i64)row.slots), own_slot = (int)(row.window ? here % row.slots : here);
  u16* const head_keys = row.keys + (i64)key_head * row.slots * DIM;
  u16* const head_values = row.values + (i64)key_head * row.slots * DIM;
  KeyShare share = {head_keys, head_values, here, 0, 0, own_slot, row.slots, row.window};
  take_share(share, used, part, row.splits);
  const AttendRoom room = AttendRoom::of(work);
  const Attention block = {share, room.ring, warp, lane};
  meet();  // of `work` nothing is read any more
  if (warp < ATTENDING) block.request();
  meet();
  if (threadIdx.x == 0) barrier_arrive(Ring::attended());  // what comes next is requested behind them
  take_vectors(row, first_head, key_head, base + row.expects & 0xFFFFu, room.incoming);
  note_time(times, 1);
  meet();
  note_time(times, 2);
  turn_vectors(row, here, room, warp);
  meet();
  // One of the blocks that share this key head writes.
  if (share.begin <= own_slot && own_slot < share.end && first_head % row.group == 0) {
    for (int d = threadIdx.x; d < DIM; d += THREADS) {
      head_keys[(i64)own_slot * DIM + d] = room.shared.queries[ATTEND_HEADS][d];
      head_values[(i64)own_slot * DIM + d] = room.shared.own_value[d];
    }
  }
  const float scale = row.growth == nullptr ? row.scale : row.scale * row.growth[here];
  if (warp < ATTENDING) block.attend(room.shared, scale, row.softcap);
  meet();
  note_time(times, 3);
  u64* const sums = row.partials + (i64)row_of_blocks * row.splits * (size + 2 * row.heads);
  u64* const own = sums + (i64)part * (size + 2 * row.heads);
  const u32 tag = base + row.tag;
  for (int o = threadIdx.x; o < size; o += THREADS) {
    const int h = o / DIM, d = o % DIM;
    const Merged all = Attention::merged(room.ring, room.shared, h, d);
    publish(own + o, all.total, tag);
    if (d == 0) publish(own + size + h, all.most, tag), publish(own + size + row.heads + h, all.weight, tag);
  }
  note_time(times, 4);
  join_sums(row, sums, part, size, first_head * DIM, tag, lane, warp);
  note_time(times, 5);
  meet();  // `work` is free again
}

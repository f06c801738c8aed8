// What runs threads, blocks and grids; compiled once, and linked into each kernel's library.
#include "emulator.h"

// Static shared memory that some kernels lack would leave these undefined.
__attribute__((section("emulated_shared"), used, aligned(16))) static uint8_t emulated_shared_first[16];

namespace emulator {

std::vector<Block> blocks;
Barrier cluster;
Fiber* current;
Dimensions grid_size, block_size;
size_t dynamic_bytes;
bool copies_at_once;

static std::vector<Fiber> fibers;  // of a cluster
static jmp_buf scheduler;
static std::string failure;
static const std::function<void()>* body;

[[noreturn]] static void switch_out() { _longjmp(scheduler, 1); }

void fail(const std::string& why) {
  char where[160];
  const Dimensions block = current->block->index;
  snprintf(where, sizeof where, " (block %u, %u, %u, thread %d)", block.x, block.y, block.z, current->number);
  failure = why + where;
  switch_out();
}

void wait_for(const uint64_t& generation) {
  current->waits_for = &generation;
  current->seen = generation;
  if (_setjmp(current->at) == 0) switch_out();
}

static void end_of_thread() {
  Warp& warp = current->block->warps[current->number / WARP];
  if (warp.arrived) fail(std::string("a thread ends while its warp waits at ") + warp.operation);
  current->done = true;
  --warp.alive;
  for (Barrier* barrier : {&current->block->barrier, &cluster}) {
    --barrier->alive;
    barrier->complete();
  }
  switch_out();
}

static void enter() {
  (*body)();
  end_of_thread();
}

static void switch_to(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    setcontext(&fiber.start);
  }
}

static uint32_t next_random(uint32_t& state) {
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

static void fill_with_garbage(uint8_t* from, uint8_t* to) {
  for (; from < to; ++from) *from = GARBAGE;  // as fp32 or bf16 a huge negative number, as int8 -5
}

static void run_cluster(Dimensions first, uint32_t size, uint32_t threads, uint32_t& random) {
  blocks.resize(size);
  fibers.resize(size * threads);
  cluster = {0, 0, (int)(size * threads)};
  fill_with_garbage(__start_emulated_shared, __stop_emulated_shared);
  for (uint32_t rank = 0; rank < size; ++rank) {
    Block& block = blocks[rank];
    if (!block.shared) block.shared = static_cast<uint8_t*>(aligned_alloc(1024, SHARED + GUARD));
    fill_with_garbage(block.shared, block.shared + dynamic_bytes + GUARD);
    block.warps.assign((threads + WARP - 1) / WARP, Warp{});
    block.barrier = {0, 0, (int)threads};
    block.index = {first.x + rank, first.y, first.z}, block.rank = rank;
    for (uint32_t i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[rank * threads + i];
      if (!fiber.stack) fiber.stack = static_cast<uint8_t*>(malloc(STACK));
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack, fiber.start.uc_stack.ss_size = STACK, fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, enter, 0);
      fiber.block = &block, fiber.index = {i, 0, 0}, fiber.number = (int)i;
      fiber.begun = fiber.done = false, fiber.waits_for = nullptr;
      fiber.copies.clear();
      ++block.warps[i / WARP].alive;
    }
  }
  std::vector<uint32_t> order(fibers.size());
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  for (uint32_t i = order.size(); random && i > 1; --i) std::swap(order[i - 1], order[next_random(random) % i]);
  while (cluster.alive) {
    bool progress = false;
    for (uint32_t i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
      progress = true;
      switch_to(fiber);
      if (!failure.empty()) return;
    }
    if (!progress) {
      failure = "all threads wait: some have not come to a barrier";
      return;
    }
  }
  for (const Block& block : blocks) {
    for (size_t at = dynamic_bytes; at < dynamic_bytes + GUARD; ++at) {
      if (block.shared[at] != GARBAGE) failure = "wrote past its dynamic shared memory";
    }
  }
}

const char* run(const uint32_t* grid, uint32_t threads, size_t shared_bytes, uint32_t cluster_size, uint32_t order,
                const std::function<void()>& kernel) {
  failure.clear();
  if (shared_bytes > SHARED) return "more dynamic shared memory than any GPU has";
  if (grid[0] % cluster_size) return "the grid is no multiple of the cluster";
  if (cluster_size > 1 && __stop_emulated_shared - __start_emulated_shared > 16) {
    return "static shared memory of clusters is not emulated";
  }
  body = &kernel, dynamic_bytes = shared_bytes, copies_at_once = order % 2;
  grid_size = {grid[0], grid[1], grid[2]}, block_size = {threads, 1, 1};
  Dimensions at;
  for (at.z = 0; at.z < grid[2]; ++at.z)
    for (at.y = 0; at.y < grid[1]; ++at.y)
      for (at.x = 0; at.x < grid[0]; at.x += cluster_size) {
        run_cluster(at, cluster_size, threads, order);
        if (!failure.empty()) return failure.c_str();
      }
  return nullptr;
}

}  // namespace emulator

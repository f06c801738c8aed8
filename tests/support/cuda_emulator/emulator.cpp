// What runs threads, blocks and grids; compiled once, and linked into each kernel's library.
#include "emulator.h"

#include <sys/mman.h>

// Static shared memory that some kernels lack would leave these undefined.
__attribute__((section("emulated_shared"), used, aligned(16))) static uint8_t emulated_shared_first[16];

namespace emulator {

std::vector<Block> blocks;
Barrier cluster;
Fiber* current;
Dimensions grid_size, block_size;
size_t dynamic_bytes;
bool copies_at_once, cooperative, wrote;

static std::vector<Fiber> fibers;  // of `blocks`
static jmp_buf scheduler;
static std::string failure;
static bool one_by_one;  // blocks begin when those before them can do no more
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

static Warp& warp_of(const Fiber& fiber) { return fiber.block->warps[fiber.number / WARP]; }

void give_way() {
  current->waits_for = nullptr;
  warp_of(*current).spins = SPIN;
  if (_setjmp(current->at) == 0) switch_out();
}

void look() {
  warp_of(*current).spins = SPIN;
  if (++current->looks % LOOKS == 0) give_way();
}

static void end_of_thread() {
  Warp& warp = warp_of(*current);
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

// Stacks of which pages take memory only once they are touched: a cooperative launch has thousands.
static uint8_t* new_stack() {
  constexpr int KIND = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, KIND, -1, 0);
  if (stack == MAP_FAILED) abort();
  return static_cast<uint8_t*>(stack);
}

static std::string who_waits() {
  std::string text = "threads wait for each other:";
  for (const Block& block : blocks) {
    int first = -1, spinning = 0, waiting = 0;
    for (const Fiber& fiber : fibers) {
      if (fiber.block != &block || fiber.done) continue;
      if (fiber.waits_for == &block.barrier.generation && block.barrier.generation == fiber.seen) {
        ++waiting;
        continue;
      }
      ++spinning;  // or its warp does
      if (first < 0) first = fiber.number;
    }
    if (spinning + waiting == 0) continue;
    char line[200];
    const Dimensions at = block.index;
    snprintf(line, sizeof line, " block %u, %u, %u (%d spin, from thread %d on, %d at __syncthreads)", at.x, at.y,
             at.z, spinning, first, waiting);
    text += line;
  }
  return text;
}

// Blocks from `first` on in x, side by side.
static void run_blocks(Dimensions first, uint32_t size, uint32_t threads, uint32_t& random) {
  blocks.resize(size);
  fibers.resize(size * threads);
  cluster = {0, 0, (int)(size * threads)};
  fill_with_garbage(__start_emulated_shared, __stop_emulated_shared);
  for (uint32_t rank = 0; rank < size; ++rank) {
    Block& block = blocks[rank];
    if (!block.shared) block.shared = static_cast<uint8_t*>(aligned_alloc(1024, SHARED + GUARD));
    fill_with_garbage(block.shared, block.shared + dynamic_bytes + GUARD);
    block.warps.assign((threads + WARP - 1) / WARP, Warp{});
    block.barrier = {0, 0, (int)threads}, block.named = {0, 0, 0};
    block.bulks.clear();
    block.index = {first.x + rank, first.y, first.z}, block.rank = rank, block.late = false;
    for (uint32_t i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[rank * threads + i];
      if (!fiber.stack) fiber.stack = new_stack();
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack, fiber.start.uc_stack.ss_size = STACK, fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, enter, 0);
      fiber.block = &block, fiber.index = {i, 0, 0}, fiber.number = (int)i;
      fiber.begun = fiber.done = false, fiber.waits_for = nullptr, fiber.looks = 0;
      fiber.copies.clear();
      ++block.warps[i / WARP].alive;
    }
  }
  std::vector<uint32_t> order(fibers.size());
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  for (uint32_t i = order.size(); random && i > 1; --i) std::swap(order[i - 1], order[next_random(random) % i]);
  std::vector<Block*> late;
  for (uint32_t i = 0; one_by_one && i < size; ++i) {
    late.insert(late.begin() + next_random(random) % (late.size() + 1), &blocks[i]);
    blocks[i].late = true;
  }
  int idle = 0;
  while (cluster.alive) {
    bool progress = false, work = false;
    wrote = false;
    for (uint32_t i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done || fiber.block->late || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
      progress = true;
      switch_to(fiber);
      if (!failure.empty()) return;
      Warp& warp = warp_of(fiber);
      if (fiber.done || !warp.spins) {
        work = true;
      } else {
        --warp.spins;
      }
    }
    if (!late.empty() && (!progress || idle == LATE)) {
      late.back()->late = false;
      late.pop_back();
      idle = 0;
      continue;
    }
    if (!progress) {
      failure = "all threads wait: some have not come to a barrier";
      return;
    }
    idle = work || wrote ? 0 : idle + 1;
    if (idle == IDLE_ROUNDS) {
      failure = who_waits();
      return;
    }
  }
  for (const Block& block : blocks) {
    if (!block.bulks.empty()) failure = "a block has ended, and nobody has waited for its bulk copies";
    for (size_t at = dynamic_bytes; at < dynamic_bytes + GUARD; ++at) {
      if (block.shared[at] != GARBAGE) failure = "wrote past its dynamic shared memory";
    }
  }
}

const char* run(const uint32_t* grid, uint32_t threads, size_t shared_bytes, uint32_t cluster_size,
                bool side_by_side, uint32_t order, const std::function<void()>& kernel) {
  failure.clear();
  if (shared_bytes > SHARED) return "more dynamic shared memory than any GPU has";
  if (grid[0] % cluster_size) return "the grid is no multiple of the cluster";
  if (side_by_side && (cluster_size > 1 || grid[1] > 1 || grid[2] > 1)) {
    return "cooperative launches have no clusters, and blocks in x alone";
  }
  const uint32_t at_once = side_by_side ? grid[0] : cluster_size;
  if (at_once > 1 && __stop_emulated_shared - __start_emulated_shared > 16) {
    return "static shared memory of blocks that run side by side is not emulated";
  }
  cooperative = side_by_side, one_by_one = side_by_side && order > 1;
  body = &kernel, dynamic_bytes = shared_bytes, copies_at_once = order % 2;
  grid_size = {grid[0], grid[1], grid[2]}, block_size = {threads, 1, 1};
  Dimensions at;
  for (at.z = 0; at.z < grid[2]; ++at.z)
    for (at.y = 0; at.y < grid[1]; ++at.y)
      for (at.x = 0; at.x < grid[0]; at.x += at_once) {
        run_blocks(at, at_once, threads, order);
        if (!failure.empty()) return failure.c_str();
      }
  return nullptr;
}

}  // namespace emulator

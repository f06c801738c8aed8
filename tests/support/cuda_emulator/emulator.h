// A GPU for kernels of csrc/, on the CPU: one cluster of blocks at a time, each thread a fiber, in an order that
// can be shuffled.
//
// It is as unkind as the programming model allows: shared memory begins as garbage, asynchronous copies arrive at
// once or, with an even `order`, only when they are waited for, and threads run one after another until they have
// to wait, so that a missing barrier shows as a wrong result in one order or another. It knows what csrc/ uses, and
// no more; it does not look for races among global writes, nor does it count time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

struct Dimensions { uint32_t x, y, z; };

// Static shared memory that some translation units lack would leave these undefined.
__attribute__((section("emulated_shared"), used, aligned(16))) static uint8_t emulated_shared_first[16];
extern uint8_t __start_emulated_shared[], __stop_emulated_shared[];

namespace emulator {

constexpr size_t STACK = 128 << 10;
constexpr size_t SHARED = 232448;  // 227 KB, the most of any GPU
constexpr size_t GUARD = 4096;     // bytes after a block's that nobody may write
constexpr int WARP = 32;
constexpr uint8_t GARBAGE = 0xFB;

struct Copy { void* to; const void* from; int bytes; bool commits; };

struct Warp {
  uint64_t generation;
  int arrived, alive;
  const char* operation;
  void* operands[WARP];
};

struct Barrier {
  uint64_t generation;
  int arrived, alive;

  void complete() {
    if (alive == 0 || arrived < alive) return;  // nobody waits for the dead
    arrived = 0;
    ++generation;
  }
};

struct Block {
  std::vector<Warp> warps;
  Barrier barrier;
  Dimensions index;
  uint32_t rank;
  uint8_t* shared;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  uint8_t* stack;
  Block* block;
  Dimensions index;
  int number;
  bool begun, done;
  const uint64_t* waits_for;  // runs on when this is no longer `seen`
  uint64_t seen, cluster_phase;
  std::vector<Copy> copies;   // asynchronous, in order; an entry that `commits` ends a group
};

static std::vector<Fiber> fibers;  // of a cluster
static std::vector<Block> blocks;
static Barrier cluster;
static Fiber* current;
static jmp_buf scheduler;
static std::string failure;
static const std::function<void()>* body;
static Dimensions grid_size, block_size;
static size_t dynamic_bytes;
static bool copies_at_once;

[[noreturn]] static inline void switch_out() { _longjmp(scheduler, 1); }

[[noreturn]] static inline void fail(const std::string& why) {
  char where[160];
  const Dimensions block = current->block->index;
  snprintf(where, sizeof where, " (block %u, %u, %u, thread %d)", block.x, block.y, block.z, current->number);
  failure = why + where;
  switch_out();
}

static inline void wait_for(const uint64_t& generation) {
  current->waits_for = &generation;
  current->seen = generation;
  if (_setjmp(current->at) == 0) switch_out();
}

// All lanes of a warp bring an operand; whoever comes last does the work for all.
template <typename Operand, typename Work>
static inline void together(const char* operation, Operand& operand, Work work) {
  Warp& warp = current->block->warps[current->number / WARP];
  if (warp.arrived && warp.operation != operation && strcmp(warp.operation, operation) != 0) {
    fail(std::string("lanes of a warp meet at ") + operation + " and " + warp.operation);
  }
  warp.operation = operation;
  warp.operands[current->number % WARP] = &operand;
  if (++warp.arrived < warp.alive) {
    wait_for(warp.generation);
    return;
  }
  if (warp.alive != WARP) fail(std::string(operation) + " of a warp of which lanes have ended");
  Operand* operands[WARP];
  for (int lane = 0; lane < WARP; ++lane) operands[lane] = static_cast<Operand*>(warp.operands[lane]);
  work(operands);
  warp.arrived = 0;
  ++warp.generation;
}

static inline void arrive(Barrier& barrier) {
  ++barrier.arrived;
  barrier.complete();
}

static inline void synchronize_block() {
  Barrier& barrier = current->block->barrier;
  const uint64_t phase = barrier.generation;
  arrive(barrier);
  if (barrier.generation == phase) wait_for(barrier.generation);
}

static inline void end_of_thread() {
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

static inline void switch_to(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    setcontext(&fiber.start);
  }
}

static inline uint32_t next_random(uint32_t& state) {
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

static inline void fill_with_garbage(uint8_t* from, uint8_t* to) {
  for (; from < to; ++from) *from = GARBAGE;  // as fp32 or bf16 a huge negative number, as int8 -5
}

static inline void run_cluster(Dimensions first, uint32_t size, uint32_t threads, uint32_t& random) {
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

// Runs a grid. `order` 0 takes threads as they are numbered, others shuffle them. Returns what failed, or null.
static inline const char* run(const uint32_t* grid, uint32_t threads, size_t shared_bytes, uint32_t cluster_size,
                              uint32_t order, const std::function<void()>& kernel) {
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

// Shared addresses: 0 and up the block's dynamic memory, STATIC and up static arrays, REMOTE + rank * 2^20 and up
// the dynamic memory of a block of the cluster.
constexpr uint32_t STATIC = 0x40000000, REMOTE = 0x80000000;

static inline uint32_t to_shared_address(const void* pointer) {
  const uint8_t* const at = static_cast<const uint8_t*>(pointer);
  const uint8_t* const mine = current->block->shared;
  if (at >= mine && at <= mine + SHARED) return (uint32_t)(at - mine);
  if (at < __start_emulated_shared || at > __stop_emulated_shared) fail("the address of something not shared");
  return STATIC + (uint32_t)(at - __start_emulated_shared);
}

static inline uint8_t* from_shared_address(uint32_t address, uint32_t bytes) {
  if (address % bytes) fail("misaligned access to shared memory");
  const Block* block = current->block;
  if (address & STATIC) {
    uint8_t* const at = __start_emulated_shared + (address - STATIC);
    if (at + bytes > __stop_emulated_shared) fail("access outside static shared memory");
    return at;
  }
  if (address & REMOTE) {
    block = &blocks[address >> 20 & 0xFF];
    if (block->barrier.alive == 0) fail("access to shared memory of a block that has ended");
    address &= 0xFFFFF;
  }
  if (address + bytes > dynamic_bytes) fail("access outside dynamic shared memory");
  return block->shared + address;
}

static inline uint32_t to_remote_address(uint32_t address, uint32_t rank) {
  if (rank >= blocks.size()) fail("no block of that rank");
  return REMOTE + (rank << 20) + address;
}

}  // namespace emulator

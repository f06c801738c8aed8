// A GPU for kernels of csrc/, on the CPU: one cluster of blocks at a time, or all blocks of a cooperative launch,
// each thread a fiber, in an order that can be shuffled.
//
// It is as unkind as the programming model allows: shared memory begins as garbage, asynchronous copies arrive at
// once or, with an even `order`, only when they are waited for, with an `order` from 2 on blocks of a cooperative
// launch begin only when those before them can do no more, and threads run one after another until they have
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

extern uint8_t __start_emulated_shared[], __stop_emulated_shared[];

namespace emulator {
constexpr unsigned long long EVICT_FIRST = 0x12F0000000000000ull;  // a policy of Hopper

constexpr size_t STACK = 128 << 10;
constexpr size_t SHARED = 232448;  // 227 KB, the most of any GPU
constexpr size_t GUARD = 4096;     // bytes after a block's that nobody may write
constexpr int WARP = 32;
constexpr uint8_t GARBAGE = 0xFB;
constexpr int SPIN = 512;           // turns of a warp's lanes for which it counts as spinning, after one has looked
constexpr int LOOKS = 16;           // for what other blocks write, after which a thread gives way
constexpr int LATE = 32;            // idle rounds after which the next block begins, where they begin one by one
constexpr int IDLE_ROUNDS = 10000;  // in which threads only spin: they would do so for ever

struct Copy { void* to; const void* from; int bytes; bool commits; };

// A copy that arrives at a barrier in shared memory, whose address is `barrier`.
struct Bulk { void* to; const void* from; int bytes; uint32_t barrier; };

struct Warp {
  uint64_t generation;
  int arrived, alive;
  int spins;  // turns for which it still counts as spinning
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
  Barrier barrier, named;  // of all threads, and of those that bar.sync names
  Dimensions index;
  uint32_t rank;
  bool late;  // it does not begin yet
  uint8_t* shared;
  std::vector<Bulk> bulks;  // that have not arrived
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  uint8_t* stack;
  Block* block;
  Dimensions index;
  int number;
  bool begun, done;
  uint32_t looks;             // for what other blocks write
  const uint64_t* waits_for;  // runs on when this is no longer `seen`
  uint64_t seen, cluster_phase;
  std::vector<Copy> copies;   // asynchronous, in order; an entry that `commits` ends a group
};

extern std::vector<Block> blocks;  // of a cluster, or all of a cooperative launch
extern Barrier cluster;
extern Fiber* current;
extern Dimensions grid_size, block_size;
extern size_t dynamic_bytes;
extern bool copies_at_once, cooperative;
extern bool wrote;  // something that other blocks may wait for

[[noreturn]] void fail(const std::string& why);
void wait_for(const uint64_t& generation);
void give_way();
void look();  // of a thread that may be in a loop, until it finds something

// Runs a grid, `side_by_side` all its blocks at once. `order` 0 takes threads as they are numbered, others shuffle
// them. Returns what failed, or null.
const char* run(const uint32_t* grid, uint32_t threads, size_t shared_bytes, uint32_t cluster_size,
                bool side_by_side, uint32_t order, const std::function<void()>& kernel);

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

static inline void need_cluster() {
  if (cooperative) fail("clusters of a cooperative launch are not emulated");
}

static inline void meet_at(Barrier& barrier) {
  const uint64_t phase = barrier.generation;
  arrive(barrier);
  if (barrier.generation == phase) wait_for(barrier.generation);
}

static inline void synchronize_block() { meet_at(current->block->barrier); }

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
  need_cluster();
  if (rank >= blocks.size()) fail("no block of that rank");
  return REMOTE + (rank << 20) + address;
}

}  // namespace emulator

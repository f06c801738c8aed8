// Barriers in shared memory (mbarrier), and bulk copies that arrive at them.
#pragma once

#include "cuda_cpp.h"

// What the 8 bytes hold; a GPU's are opaque.
struct EmulatedBarrier {
  static constexpr uint64_t MADE = 1;  // which garbage does not have
  uint64_t phase : 1, arrivals : 20, pending : 20;
  int64_t bytes : 21;  // that are expected, less those that have come
  uint64_t made : 2;

  static EmulatedBarrier& at(uint32_t address) {
    EmulatedBarrier& barrier = at_any(address);
    if (barrier.made != MADE) emulator::fail("no barrier was made there");
    return barrier;
  }
  static EmulatedBarrier& at_any(uint32_t address) {
    return *reinterpret_cast<EmulatedBarrier*>(emulator::from_shared_address(address, sizeof(EmulatedBarrier)));
  }
  void arrive() {
    if (pending == 0) emulator::fail("more arrivals at a barrier than it was made for");
    --pending;
    complete();
  }
  void come(int by) {
    bytes -= by;
    complete();
  }

 private:
  void complete() {
    if (pending || bytes) return;
    phase ^= 1, pending = arrivals;
    emulator::wrote = true;
  }
};
static_assert(sizeof(EmulatedBarrier) == 8, "a word of 64 bits");

static inline void mbarrier_init_shared_cta_b64(uint32_t address, uint32_t arrivals) {
  EmulatedBarrier& barrier = EmulatedBarrier::at_any(address);
  if (barrier.made == EmulatedBarrier::MADE) emulator::fail("a barrier is made twice");
  if (arrivals == 0 || arrivals >= 1 << 20) emulator::fail("a barrier for 0 arrivals or more than 20 bits");
  barrier = {0, arrivals, arrivals, 0, EmulatedBarrier::MADE};
}
// What threads see of each other's memory needs no fence here.
static inline void fence_mbarrier_init_release_cluster() {}
static inline void fence_proxy_async() {}

struct EmulatedSink {} static emulated_sink;  // an operand `_`
static inline void mbarrier_arrive_shared_cta_b64(EmulatedSink, uint32_t address) {
  EmulatedBarrier::at(address).arrive();
}
static inline void mbarrier_arrive_expect_tx_shared_cta_b64(EmulatedSink, uint32_t address, uint32_t bytes) {
  EmulatedBarrier& barrier = EmulatedBarrier::at(address);
  barrier.bytes += bytes;
  barrier.arrive();
}

// Copies that are not made at once arrive when somebody waits for the phase that they belong to.
static inline void emulated_arrivals(EmulatedBarrier& barrier, uint32_t address, uint32_t parity) {
  auto& bulks = emulator::current->block->bulks;
  for (size_t i = 0; i < bulks.size() && barrier.phase == parity;) {
    if (bulks[i].barrier != address) {
      ++i;
      continue;
    }
    const emulator::Bulk bulk = bulks[i];
    bulks.erase(bulks.begin() + i);
    memcpy(bulk.to, bulk.from, bulk.bytes);
    barrier.come(bulk.bytes);
  }
}
static inline void mbarrier_try_wait_parity_shared_cta_b64(bool& passed, uint32_t address, uint32_t parity) {
  EmulatedBarrier& barrier = EmulatedBarrier::at(address);
  emulated_arrivals(barrier, address, parity);
  if (barrier.phase == parity) emulator::give_way();
  passed = barrier.phase != parity;
}
// Or to whoever asks for the fourth time, as that may be all that anybody does.
static inline void mbarrier_test_wait_parity_shared_cta_b64(bool& passed, uint32_t address, uint32_t parity) {
  EmulatedBarrier& barrier = EmulatedBarrier::at(address);
  emulator::look();
  if (emulator::current->looks % 4 == 0) emulated_arrivals(barrier, address, parity);
  passed = barrier.phase != parity;
}
// A barrier of the first warps of a block.
static inline void bar_sync(int which, int threads) {
  emulator::Block& block = *emulator::current->block;
  if (which != 1 || emulator::current->number >= threads) emulator::fail("only bar.sync 1 of the first warps is emulated");
  block.named.alive = threads;
  emulator::meet_at(block.named);
}
static inline void setmaxnreg_dec_sync_aligned_u32(int) {}
static inline void setmaxnreg_inc_sync_aligned_u32(int) {}
static inline void selp_u32(uint32_t& d, uint32_t a, uint32_t b, bool which) { d = which ? a : b; }

static inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes_L2_cache_hint(
    uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, unsigned long long policy) {
  if (policy != emulator::EVICT_FIRST) emulator::fail("a cache policy that no instruction made");
  if (bytes == 0 || bytes % 16 || (uintptr_t)from % 16) emulator::fail("misaligned bulk copy");
  emulator::from_shared_address(to + bytes - 16, 16);
  uint8_t* const at = emulator::from_shared_address(to, 16);
  EmulatedBarrier& arrives_at = EmulatedBarrier::at(barrier);
  if (emulator::copies_at_once) {
    memcpy(at, from, bytes);
    arrives_at.come(bytes);
  } else {
    emulator::current->block->bulks.push_back({at, from, (int)bytes, barrier});
  }
}

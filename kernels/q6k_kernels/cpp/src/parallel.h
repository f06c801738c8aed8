// A loop on torch's threads.
#pragma once
#include <atomic>
#include <exception>

#include "tensors.h"

namespace q6k {

// Calls body(i) for every i below `count`, several at a time. An exception in a call (out of memory, say) ends the
// loop and is thrown here.
template <typename Body>
void parallel_for(int64_t count, const Body& body) {
  struct Work {
    const Body& body;
    std::atomic<bool> failed{false};
    std::exception_ptr error = nullptr;
  } work{body};
  const auto run = [](int64_t begin, int64_t end, void* context) {
    Work& all = *static_cast<Work*>(context);
    try {
      for (int64_t i = begin; i < end && !all.failed; ++i) all.body(i);
    } catch (...) {
      if (!all.failed.exchange(true)) all.error = std::current_exception();
    }
  };
  Q6K_TORCH(torch_parallel_for(0, count, 1, run, &work));
  if (work.error) std::rethrow_exception(work.error);
}

}  // namespace q6k

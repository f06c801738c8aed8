// Outputs of products with experts, for experts_wgmma.cuh and experts_mma.cuh, which follow in the same unit: blocks of
// rows of an expert's weight x tokens that have chosen it. How many each expert has is only known in memory.

constexpr int MOST_EXPERTS = 512;

// One of them: the expert, the block of its rows, and its pairs, from `first` to before `end`, in the order of experts.
struct Output {
  int expert, row_block, first, end;
};

// All outputs in order: by expert, then by row block, then by tokens, so that tiles come from memory once.
struct Outputs {
  int before[MOST_EXPERTS + 1];  // blocks of tokens of all experts before

  // By the first warp; then the block meets. `begins` is what q6k_sort_pairs has written.
  template <int TOKENS_OF_BLOCK>
  __device__ __forceinline__ void count(const int* begins, int experts, int lane) {
    int sum = 0;
    for (int first = 0; first < experts; first += 32) {
      const int expert = first + lane;
      const int pairs = expert < experts ? begins[expert + 1] - begins[expert] : 0;
      int through = (pairs + TOKENS_OF_BLOCK - 1) / TOKENS_OF_BLOCK;
      const int own = through;
#pragma unroll
      for (int apart = 1; apart < 32; apart <<= 1) {
        const int other = __shfl_sync(0xFFFFFFFFu, through, max(lane - apart, 0));
        if (lane >= apart) through += other;
      }
      if (expert < experts) before[expert] = sum + through - own;
      sum += __shfl_sync(0xFFFFFFFFu, through, 31);
    }
    if (lane == 0) before[experts] = sum;
  }

  // Output `index`, which is below before[experts] * row_blocks.
  template <int TOKENS_OF_BLOCK>
  __device__ __forceinline__ Output at(int index, const int* begins, int experts, int row_blocks) const {
    const int wanted = index / row_blocks;
    int low = 0, high = experts;  // before[low] <= wanted < before[high]
    while (high - low > 1) {
      const int middle = (low + high) >> 1;
      if (before[middle] <= wanted) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int own = before[low + 1] - before[low], within = index - before[low] * row_blocks;
    return {low, within / own, begins[low] + within % own * TOKENS_OF_BLOCK, begins[low + 1]};
  }
};

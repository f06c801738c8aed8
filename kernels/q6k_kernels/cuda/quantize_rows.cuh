// Rows of activations in 8 bits, once for all blocks of a decode kernel that is not Q6K_FUSED.
//
//   Q6K_TOKENS, Q6K_FUSED   see quantize.cuh, which comes before this file; Q6K_FUSED is 0

// Parameters: x 16-bit (m, k), rows 16-byte aligned and `stride` elements apart; codes and steps, as decode reads them
// for all of K, sums and parts after the steps; rows from m to TOKENS and columns from k on become zeros. Grid: a
// thread for each 16 activations of TOKENS rows of whole super-blocks.
extern "C" __global__ void __launch_bounds__(128)
    q6k_quantize(const u16* x, u8* codes, float* steps, i64 stride, int m, int k) {
  let_dependents_start();
  const int groups = super_blocks_of(k) * 16, at = blockIdx.x * 128 + threadIdx.x;
  const int own = min(at, TOKENS * groups - 1), token = own / groups, group = own - token * groups;
  wait_for_previous_grid();
  uint4 raw[2] = {};
  if (token < m && group * 16 < k) {
    const uint4* const from = reinterpret_cast<const uint4*>(x + token * stride + group * 16);
    raw[0] = from[0], raw[1] = from[1];
  }
  quantize_into(Quantized::all(codes, steps, k), raw, token, group, at < TOKENS * groups);
}

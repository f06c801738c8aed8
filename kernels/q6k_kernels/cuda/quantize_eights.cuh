// As quantize_into (quantize.cuh), of one token, with eight values a thread: four lanes have a d_a.

// A warp's: a lane has the eight values of number `eight` of the row. All parts are written.
__device__ __forceinline__ void quantize_eight_into(const Quantized& to, const float (&values)[8], int eight,
                                                    bool present) {
  float largest = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) largest = largest_or_nan(largest, fabsf(values[j]));
  largest = largest_or_nan(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
  largest = largest_or_nan(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
  const float d = step_for(largest);
  u32 words[8];
  quantize_group(values, d, words);
  const u32 first = low_bytes(words[0], words[1], words[2], words[3]);
  const u32 second = low_bytes(words[4], words[5], words[6], words[7]);
  // A sixteen's first eight and its last eight lie side by side in each word. A lane writes two of the four words.
  const bool odd = eight & 1;
  const u32 of_other = __shfl_xor_sync(0xFFFFFFFFu, odd ? first : second, 1);
  const u32 low = odd ? of_other : first, high = odd ? second : of_other;
  const int own = __dp4a((int)second, 0x01010101, __dp4a((int)first, 0x01010101, 0));
  const int of_sixteen = own + __shfl_xor_sync(0xFFFFFFFFu, own, 1);
  const int of_next = __shfl_xor_sync(0xFFFFFFFFu, of_sixteen, 2);
  if (!present) return;
  const int group = eight >> 1, pair = group >> 1;
  u8* const code_words = to.codes + (group >> 2) * CHUNK_BYTES + (group & 3) * 4 + (odd ? 32 : 0);
  *reinterpret_cast<u32*>(code_words) = __byte_perm(low, high, 0x5410);
  *reinterpret_cast<u32*>(code_words + 16) = __byte_perm(low, high, 0x7632);
  if (eight & 3) return;
  to.steps[pair] = d;
  to.sums[pair] = __byte_perm(of_sixteen, of_next, 0x5410);
  u16* const parts = to.parts + (pair >> 3) * 32 + (pair >> 1 & 3) * 8 + (pair & 1);
  float left = d * (float)(of_sixteen + of_next);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const u32 part = to_bf16(left);
    parts[2 * i] = (u16)part;
    left -= bf16_to_float(part);
  }
}

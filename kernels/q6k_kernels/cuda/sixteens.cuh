// Groups of 16 values of a row, of 16 bits in memory and of 32 in registers. gates.cuh comes before this file.

__device__ __forceinline__ void load_16(const u16* from, uint4 (&raw)[2]) {
  raw[0] = reinterpret_cast<const uint4*>(from)[0];
  raw[1] = reinterpret_cast<const uint4*>(from)[1];
}

__device__ __forceinline__ void store_16(u16* to, const uint4 (&raw)[2]) {
  reinterpret_cast<uint4*>(to)[0] = raw[0];
  reinterpret_cast<uint4*>(to)[1] = raw[1];
}

__device__ __forceinline__ void to_floats(const uint4 (&raw)[2], float (&values)[16]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const u32 word = word_of(raw[j >> 2], j & 3);
    values[2 * j] = half_to_float(word & 0xFFFFu);
    values[2 * j + 1] = half_to_float(word >> 16);
  }
}

__device__ __forceinline__ void to_halves(const float (&values)[16], uint4 (&raw)[2]) {
  u32 words[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) words[j] = pack_halves(values[2 * j], values[2 * j + 1]);
  raw[0] = make_uint4(words[0], words[1], words[2], words[3]);
  raw[1] = make_uint4(words[4], words[5], words[6], words[7]);
}

__device__ __forceinline__ void round_16(float (&values)[16]) {
  uint4 raw[2];
  to_halves(values, raw);
  to_floats(raw, values);
}

// gate = its activation, times `up` if there is one.
__device__ __forceinline__ void apply_gate(int kind, uint4 (&gate)[2], const uint4 (&up)[2], bool gated) {
  float values[16], factors[16];
  to_floats(gate, values);
  to_floats(up, factors);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    if (kind == CLAMPED_SWIGLU) {
      values[j] = clamped_swiglu(values[j], factors[j]);
    } else {
      values[j] = gated ? activated(kind, values[j]) * factors[j] : activated(kind, values[j]);
    }
  }
  to_halves(values, gate);
}

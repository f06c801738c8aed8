// Four 16-bit values of a thread.

__device__ __forceinline__ void to_floats(uint2 raw, float (&values)[4]) {
  values[0] = half_to_float(raw.x & 0xFFFFu), values[1] = half_to_float(raw.x >> 16);
  values[2] = half_to_float(raw.y & 0xFFFFu), values[3] = half_to_float(raw.y >> 16);
}

__device__ __forceinline__ uint2 to_halves(const float (&values)[4]) {
  return make_uint2(pack_halves(values[0], values[1]), pack_halves(values[2], values[3]));
}

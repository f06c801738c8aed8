// Words by which blocks that run at the same time hand values to each other. A word is 16 bits of a value and above
// them the 16 bits of a tag, or an fp32 value and a tag of 32 bits. It is written and read at once, so a reader that
// finds the tag it expects has the value: there is no other order to keep. Memory that is used again has another tag.

__device__ __forceinline__ void publish(u32* to, u32 half, u32 tag) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(half | tag << 16) : "memory");
}

__device__ __forceinline__ void publish(u64* to, float value, u32 tag) {
  const u64 word = (u64)tag << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

__device__ __forceinline__ uint4 load_words(const u32* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ bool has_tag(const uint4& words, u32 tag) {
  const u32 other = (words.x ^ tag << 16) | (words.y ^ tag << 16) | (words.z ^ tag << 16) | (words.w ^ tag << 16);
  return other < 0x10000u;
}

// Waits for COUNT times four values, and returns them as pairs. at(i) is where they come, or null if they are not wanted.
template <int COUNT, typename At>
__device__ __forceinline__ void await_words(At at, u32 tag, uint2 (&pairs)[COUNT]) {
  uint4 words[COUNT] = {};
#pragma unroll
  for (int i = 0; i < COUNT; ++i) words[i].x = at(i) == nullptr ? 0 : ~(tag << 16);  // not there yet
  bool there;
  do {
    there = true;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (at(i) != nullptr && !has_tag(words[i], tag)) words[i] = load_words(at(i));
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) there = there && (at(i) == nullptr || has_tag(words[i], tag));
  } while (!there);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    pairs[i] = make_uint2(__byte_perm(words[i].x, words[i].y, 0x5410), __byte_perm(words[i].z, words[i].w, 0x5410));
  }
}

__device__ __forceinline__ u64 load_word(const u64* from) {
  u64 word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}

// Waits for three fp32 values.
__device__ __forceinline__ void await_floats(const u64* const (&from)[3], u32 tag, float (&values)[3]) {
  bool there;
  do {
    there = true;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const u64 word = load_word(from[i]);
      values[i] = __uint_as_float((u32)word);
      there = there && (u32)(word >> 32) == tag;
    }
  } while (!there);
}

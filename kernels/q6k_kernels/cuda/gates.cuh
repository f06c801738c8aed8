// The gates of networks, and of attention: the logistic function alone.

enum Gate { SILU = 0, GELU_TANH = 1, RELU_SQUARED = 2, CLAMPED_SWIGLU = 3, LOGISTIC = 4 };

// Of the first three kinds.
__device__ __forceinline__ float activated(int kind, float v) {
  if (kind == RELU_SQUARED) return v < 0.0f ? 0.0f : v * v;
  // gelu's tanh(u) is 1 - 2 / (1 + e^2u), so 0.5 (1 + tanh(u)) is the logistic function of 2u.
  const float u = kind == GELU_TANH ? 1.5957691216057308f * fmaf(0.044715f * v * v, v, v) : v;
  return __fdividef(v, 1.0f + __expf(-u));
}

// As in weights/experts.py: gates have an upper bound, what they gate has two, and 1 is added to it.
__device__ __forceinline__ float clamped_swiglu(float gate, float up) {
  constexpr float ALPHA = 1.702f, LIMIT = 7.0f;
  gate = gate > LIMIT ? LIMIT : gate;
  up = up > LIMIT ? LIMIT : up < -LIMIT ? -LIMIT : up;
  return __fdividef(gate, 1.0f + __expf(-ALPHA * gate)) * (up + 1.0f);
}

// decode_plan.py's `plan`, line by line.
#include <algorithm>
#include <iterator>
#include <vector>

#include "plans.h"

namespace q6k {
namespace {

struct Shape {
  int64_t warps, stages, occupancy;
};

struct Choice {
  Shape shape;
  bool fused, early;
  int64_t resident;
};

// `Choice.of`; `resident` 0 is as many blocks as fit.
Choice choice_of(Shape shape, bool fused, bool early = true, int64_t resident = 0) {
  return {shape, fused, early || !fused, resident ? resident : shape.occupancy};
}

std::vector<Choice> choices(int64_t tokens, int64_t k, double tiles, bool exact, const Device& device) {
  const bool is_short = 10 < tiles && tiles <= 48;
  const bool fused = (tokens <= 2 && k < 16384 && (k <= 4096 || tiles <= 48 || (tokens == 2 && k > 8192))) ||
                     (2 < tokens && tokens <= FUSED_TOKENS && k <= 4096 && tiles > 10);
  const bool early = !is_short && k <= 8192 && tokens <= 2;
  if (device.shared_bytes < 160 << 10) return {choice_of({8, 2, 1}, fused, early)};
  std::vector<Choice> two, large;
  for (const auto& each : SHAPES) {
    const Shape shape = {each[0], each[1], each[2]};
    if (shape.occupancy == 2) two.push_back(choice_of(shape, fused, early, fused));
    if (shape.warps == 16) large.push_back(choice_of(shape, fused, early));
  }
  if (device.arch < 90) large.push_back(choice_of({8, 2, 1}, fused, early));
  const auto then_large = [&](std::vector<Choice> first) {
    first.insert(first.end(), large.begin(), large.end());
    return first;
  };
  if (tokens == 1 && !fused) return exact && k < 16384 ? then_large({choice_of({8, 3, 2}, false)}) : large;
  if (fused && tokens <= 2) {
    const bool overlapping = tokens == 1 && k <= 4096 && tiles > 48;
    if (is_short) return then_large(two);
    return overlapping ? then_large({choice_of({8, exact ? 2 : 3, 2}, fused, early)}) : large;
  }
  if (fused || (tokens == 2 && k > 8192)) return large;
  const std::vector<Choice> small = {choice_of({8, 2, 1}, false)};
  if (k > 8192) return then_large(small);
  if (tokens <= 4) return tiles > 10 ? then_large(two) : large;
  if (exact || tiles > 250) return tiles > 10 ? then_large({choice_of({8, 2, 2}, false)}) : large;
  return then_large(small);
}

struct Fitting {
  int64_t ranges, shared_bytes;
};

// `_shared_bytes`.
std::optional<Fitting> fit(int64_t tokens, const Choice& choice, int64_t row_tiles, int64_t blocks, int64_t cluster,
                           int64_t ranges, const WeightType& type, const Device& device) {
  const Shape& shape = choice.shape;
  const int64_t limit =
      std::min(device.shared_bytes, device.multiprocessor_shared_bytes / shape.occupancy - 1024);
  const int64_t ring = shape.warps * shape.stages * type.tile_bytes;
  const ActivationBytes each = activation_bytes(tokens, choice.fused);
  const int64_t activations = ceil_div(blocks, cluster) * (each.codes + each.steps);
  const int64_t slot = TILE_ROWS * tokens * 4;
  int64_t slots = 2 * shape.warps;
  if (cluster > 1) {
    const int64_t room = limit - ring - activations;
    const int64_t most_rows = room < 0 ? 0 : room / slot - shape.warps;
    if (most_rows < 1) return std::nullopt;
    ranges = std::max(ranges, ceil_div(row_tiles, most_rows));
    slots = ceil_div(row_tiles, ranges) + shape.warps;
  }
  const int64_t needed = ring + activations + slots * slot;
  if (needed > limit) return std::nullopt;
  return Fitting{ranges, needed};
}

}  // namespace

ActivationBytes activation_bytes(int64_t tokens, bool fused) {
  return {4 * (64 * tokens + (fused ? 16 : 0)), tokens <= 4 ? 32 * tokens : 256};
}

std::optional<DecodePlan> plan_decode(int64_t m, int64_t n, int64_t k, const WeightType& type, const Device& device) {
  const int64_t tokens = *std::find_if(std::begin(TOKENS), std::end(TOKENS), [m](int64_t t) { return t >= m; });
  const int64_t row_tiles = ceil_div(n, TILE_ROWS), blocks = k / SUPER_BLOCK;
  const double tiles = static_cast<double>(row_tiles * blocks) / static_cast<double>(device.multiprocessors);
  const std::vector<Choice> tried = choices(tokens, k, tiles, type.scales == SCALES_STEPPED, device);
  for (const int64_t cluster : CLUSTERS) {
    if (cluster > std::min<int64_t>(blocks, device.arch >= 90 ? 8 : 1)) continue;
    for (const Choice& choice : tried) {
      const int64_t at_once = device.multiprocessors * choice.resident;
      const int64_t ranges = std::min(row_tiles, std::max<int64_t>(1, at_once / cluster));
      const auto fitting = fit(tokens, choice, row_tiles, blocks, cluster, ranges, type, device);
      if (fitting && fitting->ranges <= MOST_WAVES * at_once && row_tiles * fitting->ranges < int64_t{1} << 31) {
        const Shape& shape = choice.shape;
        return DecodePlan{tokens,  choice.fused,    shape.warps,  shape.stages,         shape.occupancy,
                          cluster, fitting->ranges, choice.early, fitting->shared_bytes};
      }
    }
  }
  return std::nullopt;
}

}  // namespace q6k

// `plan` of cuda/decode_plan.py: the first of DECODE_ROWS for a size, then the first of its shapes that fits.
#include <algorithm>
#include <iterator>
#include <vector>

#include "plans.h"

namespace q6k {
namespace {

// `Choice`.
struct Way {
  int64_t warps, stages, occupancy, fused, early, resident;
};

// `choices`, without clusters.
std::vector<Way> ways_of(const DecodeRow& row, const Device& device) {
  std::vector<Way> ways;
  const auto add = [&](const int64_t(&shape)[3]) {
    const int64_t early = row.early || !row.fused, resident = std::min(row.resident, shape[2]);
    ways.push_back({shape[0], shape[1], shape[2], row.fused, early, resident});
  };
  std::for_each_n(row.shapes, row.count, add);
  if (device.arch < CLUSTER_ARCH || device.shared_bytes < LARGE_SHARED) {
    std::for_each(std::begin(SMALL), std::end(SMALL), add);
  }
  return ways;
}

// `room_of` and `ranges_of`; none if the shape does not fit.
std::optional<DecodePlan> fit(const Way& way, int64_t tokens, int64_t row_tiles, int64_t blocks, int64_t cluster,
                              const WeightType& type, const Device& device) {
  const int64_t limit = std::min(device.shared_bytes, device.multiprocessor_shared_bytes / way.occupancy - 1024);
  const ActivationBytes each = activation_bytes(tokens, way.fused);
  const int64_t needed = each.codes + each.steps * (type.offset ? 2 : 1) + (type.minimum ? each.parts : 0);
  const int64_t taken =
      way.warps * way.stages * type.tile_bytes + ceil_div(blocks, cluster) * needed;
  const int64_t sums_bytes = TILE_ROWS * tokens * 4, slots = limit < taken ? 0 : (limit - taken) / sums_bytes;
  const int64_t at_once = device.multiprocessors * way.resident;
  int64_t ranges = std::min(row_tiles, std::max<int64_t>(1, at_once / cluster)), sums = 2 * way.warps;
  if (cluster > 1) {
    if (slots <= way.warps) return std::nullopt;
    ranges = std::max(ranges, ceil_div(row_tiles, slots - way.warps));
    sums = ceil_div(row_tiles, ranges) + way.warps;
  }
  if (slots < sums || ranges > MOST_WAVES * at_once || row_tiles * ranges >= int64_t{1} << 31) return std::nullopt;
  return DecodePlan{tokens,  way.fused, way.warps, way.stages,               way.occupancy,
                    cluster, ranges,    way.early, taken + sums * sums_bytes};
}

}  // namespace

ActivationBytes activation_bytes(int64_t tokens, bool fused) {
  return {4 * (64 * tokens + (fused ? 16 : 0)), tokens <= 4 ? 32 * tokens : 256, 64 * tokens};
}

std::optional<DecodePlan> plan_decode(int64_t m, int64_t n, int64_t k, const WeightType& type, const Device& device) {
  const int64_t tokens = *std::find_if(std::begin(TOKENS), std::end(TOKENS), [m](int64_t t) { return t >= m; });
  const int64_t row_tiles = ceil_div(n, TILE_ROWS), blocks = super_blocks(k);
  const int64_t format = int64_t{1} << type.index, columns = blocks * SUPER_BLOCK;
  const int64_t tiles = ceil_div(row_tiles * blocks, device.multiprocessors);
  const DecodeRow& row = *std::find_if(std::begin(DECODE_ROWS), std::end(DECODE_ROWS), [=](const DecodeRow& each) {
    return each.formats & format && each.tokens & tokens && columns <= each.k && tiles <= each.tiles;
  });
  const std::vector<Way> ways = ways_of(row, device);
  for (const int64_t cluster : CLUSTERS) {
    if (cluster > std::min<int64_t>(blocks, device.arch >= CLUSTER_ARCH ? 8 : 1)) break;
    for (const Way& way : ways) {
      if (const auto plan = fit(way, tokens, row_tiles, blocks, cluster, type, device)) return plan;
    }
  }
  return std::nullopt;
}

}  // namespace q6k

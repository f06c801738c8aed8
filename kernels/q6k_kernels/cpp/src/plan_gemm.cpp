// `plan` of cuda/gemm_wgmma.py and cuda/gemm_mma.py, line by line, with the same order of operations on doubles.
#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "plans.h"

namespace q6k {

const WeightType& weight_type(std::string_view name) {
  std::string names;
  for (const WeightType& type : WEIGHT_TYPES) {
    if (name == type.name) return type;
    names += (names.empty() ? "" : ", ") + std::string(type.name);
  }
  throw std::invalid_argument("format: expected one of " + names + ", found '" + std::string(name) + "'");
}

namespace {

WgmmaPlan wgmma_of(const WgmmaConfig& config, int64_t resident, bool share, int64_t m, int64_t n, int64_t k,
                   const Device& device) {
  const int64_t token_blocks = ceil_div(m, config.tokens), row_blocks = ceil_div(n, config.rows);
  const int64_t outputs = token_blocks * row_blocks, blocks = device.multiprocessors * resident;
  const int64_t whole = share ? outputs / blocks * blocks : outputs;
  const int64_t pairs = (outputs - whole) * super_blocks(k);
  if (!(0 < pairs && pairs < int64_t{1} << 31)) {
    return {&config, token_blocks, row_blocks, std::min(outputs, blocks), outputs};
  }
  return {&config, token_blocks, row_blocks, whole ? blocks : std::min(pairs, blocks), whole};
}

double wgmma_cost(const WgmmaPlan& plan, int64_t k, const Device& device) {
  const WgmmaConfig& config = *plan.config;
  const int64_t depth = super_blocks(k), resident = ceil_div(plan.blocks, device.multiprocessors);
  const int64_t rounds = ceil_div(plan.whole, plan.blocks);
  const double x_mb = static_cast<double>(plan.token_blocks * config.tokens * k * 2) / 1e6;
  const double far = 1 + std::min(0.25, std::max(0.0, x_mb - 10) / 200);
  const double pairs = static_cast<double>(rounds * depth) +
                       static_cast<double>(ceil_div(plan.shared() * depth, plan.blocks)) * far;
  double alone = 1.0;
  if (resident < config.occupancy) alone = config.tokens <= 64 ? 1.35 : plan.shared() ? 1.2 : 1.5;
  double ends = 4000.0;
  if (plan.shared()) {
    const int64_t sums = config.tokens * config.consumers;
    ends += static_cast<double>(4500 + 10 * sums + 3000 * (resident - 1));
    const double others = static_cast<double>(plan.blocks) / static_cast<double>(plan.shared()) - 1;
    ends += static_cast<double>(4 * sums) * std::min(3.0, std::max(0.0, others));
  }
  return pairs * static_cast<double>(resident) * static_cast<double>(config.cycles) * alone + ends;
}

int64_t slots_of(int64_t arch) {
  return std::find(std::begin(SMALL_SHARED), std::end(SMALL_SHARED), arch) != std::end(SMALL_SHARED) ? 1 : 2;
}

MmaPlan mma_of(int64_t tokens, int64_t parts, int64_t splits, int64_t m, int64_t n, const WeightType& type,
               const Device& device) {
  const int64_t slots = slots_of(device.arch);
  const int64_t blocks = ceil_div(m, tokens) * ceil_div(n, TILE_ROWS * MMA_WARPS / parts);
  return {tokens, parts, splits, slots, blocks, 2 * MMA_STAGE_BYTES + MMA_WARPS * slots * type.tile_bytes};
}

double mma_cost(const MmaPlan& plan, int64_t m, int64_t n, int64_t k, const Device& device) {
  const int64_t fullest = ceil_div(plan.blocks * plan.splits, device.multiprocessors);
  const double alone = fullest == 1 ? 1.3 : 1.0;
  const double adding = plan.splits > 1 ? 2.0 + static_cast<double>(plan.splits * m * n * 8) / 4e6 : 0.0;
  return static_cast<double>(fullest) * alone * (static_cast<double>(plan.steps(k)) + 0.5) +
         0.1 * static_cast<double>(plan.parts) + adding;
}

}  // namespace

WgmmaPlan plan_wgmma(int64_t m, int64_t n, int64_t k, const Device& device) {
  WgmmaPlan best = {};
  double least = 0.0;
  for (const WgmmaConfig& config : WGMMA_CONFIGS) {
    for (int64_t resident = 1; resident <= config.occupancy; resident += std::max<int64_t>(1, config.occupancy - 1)) {
      for (const bool share : {false, true}) {
        const WgmmaPlan plan = wgmma_of(config, resident, share, m, n, k, device);
        const double cost = wgmma_cost(plan, k, device);
        if (best.blocks == 0 || cost < least) best = plan, least = cost;
      }
    }
  }
  return best;
}

MmaPlan plan_mma(int64_t m, int64_t n, int64_t k, const WeightType& type, const Device& device) {
  int64_t tokens = 16;
  while (tokens < 64 && tokens < m) tokens *= 2;
  const int64_t workspaces = std::max<int64_t>(1, MOST_WORKSPACE / (4 * m * n));
  const int64_t most = std::min({MOST_SPLITS, super_blocks(k), workspaces});
  MmaPlan best = {};
  double least = 0.0;
  for (const auto& config : MMA_CONFIGS) {
    if (config[0] != tokens) continue;
    for (int64_t splits = 1; splits <= most; ++splits) {
      const MmaPlan plan = mma_of(tokens, config[1], splits, m, n, type, device);
      const double cost = mma_cost(plan, m, n, k, device);
      if (best.blocks == 0 || cost < least) best = plan, least = cost;
    }
  }
  return best;
}

}  // namespace q6k

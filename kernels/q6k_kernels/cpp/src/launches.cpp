#include "launches.h"

#include <random>
#include <stdexcept>

namespace q6k {
namespace {

Key decode_key(const DecodePlan& plan, const Product& product) {
  return Key(DECODE, *product.type, {product.fp16, plan.tokens, plan.fused, plan.warps, plan.stages, plan.occupancy,
                                     plan.cluster > 1});
}

bool overlaps(const Device& device) { return device.arch >= 90; }

// A size in the type of kernel parameters.
int integer(int64_t value) {
  if (value < 0 || value > INT32_MAX) {
    throw std::invalid_argument("expected sizes below 2^31, found " + std::to_string(value));
  }
  return static_cast<int>(value);
}

const char* bytes_at(const void* pointer, int64_t bytes) { return static_cast<const char*>(pointer) + bytes; }

// Quantised rows in the layout of the kernel for `plan.tokens` rows.
const void* quantize(const DecodePlan& plan, const Product& product, Scratch& scratch) {
  const ActivationBytes each = activation_bytes(plan.tokens, false);
  const int64_t blocks = super_blocks(product.k), codes = blocks * each.codes;
  void* const quantized = scratch.take(codes + blocks * (2 * each.steps + each.parts));
  const Arguments arguments(product.x, static_cast<const void*>(quantized), bytes_at(quantized, codes),
                            product.stride, integer(product.m), integer(product.k));
  Launch how = {ceil_div(plan.tokens * blocks * SUPER_BLOCK / 16, QUANTIZE_THREADS), 1, QUANTIZE_THREADS, product.stream};
  how.dependent = overlaps(*product.device);
  load(Key(QUANTIZE_ROWS, {product.fp16, plan.tokens, false}), "q6k_quantize", *product.device).launch(how, arguments);
  return quantized;
}

void launch_one(const DecodePlan& plan, const Product& product, Scratch& scratch) {
  const Kernel& kernel = load(decode_key(plan, product), "q6k_decode", *product.device);
  const void* const x = plan.fused ? product.x : quantize(plan, product, scratch);
  const Arguments arguments(product.tiles, x, product.y, product.bias, product.stride, product.bias_kind,
                            integer(product.m), integer(product.n), integer(product.k), integer(product.row_tiles),
                            integer(plan.early));
  Launch how = {plan.ranges * plan.cluster, 1, plan.warps * 32, product.stream, plan.shared_bytes, plan.cluster};
  how.dependent = overlaps(*product.device);
  kernel.launch(how, arguments);
}

std::atomic<uint64_t>& ticket() {
  static std::atomic<uint64_t> next = []() {
    std::random_device random;
    return (static_cast<uint64_t>(random()) << 31) ^ random();
  }();
  return next;
}

// A CUtensorMap; the contiguous dimension first.
void encode(CUtensorMap& map, const void* pointer, int type, uint32_t rank, const uint64_t* sizes,
            const uint64_t* strides, const uint32_t* box, int swizzle) {
  const uint32_t steps[] = {1, 1, 1};
  check(driver().cuTensorMapEncodeTiled(&map, type, rank, const_cast<void*>(pointer), sizes, strides, box, steps,
                                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "cuTensorMapEncodeTiled");
}

uint64_t u64(int64_t value) { return static_cast<uint64_t>(value); }
uint32_t u32(int64_t value) { return static_cast<uint32_t>(value); }

}  // namespace

void set_ticket(uint64_t next) { ticket() = next; }

void launch_decode(const Product& product, Scratch& scratch) {
  for (int64_t at = 0; at < product.m;) {
    Product part = product;
    part.m = product.m - at < MOST_TOKENS ? product.m - at : MOST_TOKENS;
    auto plan = plan_decode(part.m, part.n, part.k, *part.type, *part.device);
    while (!plan) {
      if (part.m == 1) {
        throw std::invalid_argument("activations int8: rows of K = " + std::to_string(product.k) +
                                    " do not fit in the " + std::to_string(product.device->shared_bytes) +
                                    " bytes of shared memory of this GPU's blocks; use activations='bf16'");
      }
      part.m /= 2;
      plan = plan_decode(part.m, part.n, part.k, *part.type, *part.device);
    }
    part.x = bytes_at(product.x, at * product.stride * 2);
    part.y = static_cast<char*>(product.y) + at * product.n * 2;
    launch_one(*plan, part, scratch);
    at += part.m;
  }
}

void launch_wgmma(const Product& product, Scratch& scratch) {
  const WgmmaPlan plan = plan_wgmma(product.m, product.n, product.k, *product.device);
  const WgmmaConfig& config = *plan.config;
  const int64_t stages = config.stages[product.type->index];
  const Key key(GEMM_WGMMA, *product.type, {product.fp16, config.tokens, config.consumers, stages,
                                            config.x_stages, config.occupancy});
  const Kernel& kernel = load(key, "q6k_gemm_wgmma", *product.device);
  const void* const sums = scratch.take(4 * plan.scratch_floats() + 8 * plan.scratch_flags());
  Arguments arguments(product.y, product.bias, sums, bytes_at(sums, 4 * plan.scratch_floats()),
                      ticket().fetch_add(1), product.bias_kind, integer(product.m), integer(product.n),
                      integer(product.k), integer(product.n), integer(plan.whole));
  const int64_t bytes = product.type->tile_bytes, pieces = product.type->tile_pieces, width = bytes / pieces;
  const int64_t blocks = super_blocks(product.k);
  // The driver encodes for the thread's current context; a thread that has not used CUDA yet has none.
  const Current current(primary_context(product.device->index));
  CUtensorMap map;
  const uint64_t tile_sizes[] = {u64(width / 4), u64(blocks * pieces), u64(product.row_tiles)};
  const uint64_t tile_strides[] = {u64(width), u64(blocks * bytes)};
  const uint32_t tile_box[] = {u32(width / 4), u32(pieces), u32(config.rows / TILE_ROWS)};
  encode(map, product.tiles, CU_TENSOR_MAP_DATA_TYPE_UINT32, 3, tile_sizes, tile_strides, tile_box,
         CU_TENSOR_MAP_SWIZZLE_NONE);
  arguments.append_at(112, &map, sizeof map);
  const uint64_t x_sizes[] = {u64(product.k), u64(product.m)}, x_strides[] = {u64(product.stride * 2)};
  const uint32_t x_box[] = {64, u32(config.tokens)};
  encode(map, product.x, product.fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
         x_sizes, x_strides, x_box, CU_TENSOR_MAP_SWIZZLE_128B);
  arguments.append_at(112 + sizeof map, &map, sizeof map);
  Launch how = {plan.blocks, 1, config.threads, product.stream,
                config.shared_bytes[product.type->index]};
  how.dependent = true;
  kernel.launch(how, arguments);
}

void launch_mma(const Product& product, Scratch& scratch) {
  const MmaPlan plan = plan_mma(product.m, product.n, product.k, *product.type, *product.device);
  const bool split = plan.splits > 1;
  const Key key(GEMM_MMA, *product.type, {product.fp16, plan.tokens, plan.parts, plan.slots});
  const int64_t outputs = product.m * product.n;
  const void* const sums = split ? scratch.take(4 * plan.splits * outputs) : nullptr;
  const Arguments arguments(product.tiles, product.x, product.y, sums, product.bias, product.stride,
                            product.bias_kind, integer(product.m), integer(product.n), integer(product.k));
  Launch how = {plan.blocks, plan.splits, MMA_THREADS, product.stream, plan.shared_bytes};
  how.dependent = overlaps(*product.device);
  load(key, "q6k_gemm_mma", *product.device).launch(how, arguments);
  if (!split) return;
  Launch adding = {ceil_div(outputs, REDUCE_THREADS), 1, REDUCE_THREADS, product.stream};
  adding.dependent = overlaps(*product.device);
  load(key, "q6k_reduce", *product.device)
      .launch(adding, Arguments(sums, product.y, product.bias, product.bias_kind, integer(product.m),
                                integer(product.n), integer(plan.splits)));
}

void launch_pack(const Planes& planes, const WeightType& type, void* tiles, int64_t n, int64_t k, int64_t count,
                 const Device& device, CUstream stream) {
  const Launch how = {ceil_div(count, PACK_WARPS), 1, 32 * PACK_WARPS, stream};
  const auto& at = planes.at;
  load(Key(PACK, type, {}), "q6k_pack", device)
      .launch(how, Arguments(at[0], at[1], at[2], at[3], at[4], at[5], tiles, integer(n), integer(k), count));
}

void launch_gather(const void* tiles, const void* indices, bool int32, void* out, int out_kind, int64_t count,
                   int64_t n, int64_t k, const WeightType& type, const Device& device, CUstream stream) {
  const int64_t pairs = count * super_blocks(k);
  if (pairs > int64_t{UINT32_MAX} - 63) {
    throw std::invalid_argument("indices: expected less than a terabyte of rows, found " + std::to_string(count) +
                                " of " + std::to_string(k));
  }
  Launch how = {ceil_div(pairs * 4, ROW_THREADS), 1, ROW_THREADS, stream};
  how.dependent = overlaps(device);
  load(Key(ROWS, type, {out_kind, int32}), "q6k_gather", device)
      .launch(how, Arguments(tiles, indices, out, static_cast<unsigned int>(pairs), integer(n), integer(k)));
}

void launch_dequantize(const void* tiles, void* out, int out_kind, int64_t first_row, int64_t rows, int64_t k,
                       const WeightType& type, const Device& device, CUstream stream) {
  const int64_t half_tiles = 2 * ceil_div(rows, TILE_ROWS) * super_blocks(k);
  const Launch how = {ceil_div(half_tiles * 32, ROW_THREADS), 1, ROW_THREADS, stream};
  load(Key(ROWS, type, {out_kind, false}), "q6k_dequantize", device)
      .launch(how, Arguments(tiles, out, integer(first_row), integer(rows), integer(k)));
}

}  // namespace q6k

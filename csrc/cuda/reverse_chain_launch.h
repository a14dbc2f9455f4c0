// The reverse chain on CUDA: what reverse_chain.cpp hands to reverse_chain.cu after its checks.
#pragma once

#include "schedule.h"

namespace seda {

using Bits16 = uint16_t;  // a bfloat16

struct WeightMatrix {
  const Bits16* data;  // (rows, columns) without gaps
  int rows, columns;
};

struct ChainLaunch {
  ChainShape shape;
  int64_t rows;
  const Bits16 *initial, *source, *condition;
  int64_t initial_stride, source_stride, condition_stride;
  Bits16* result;             // (rows, dim)
  const float* coefficients;  // (steps, 5)
  const float* modulation;    // (steps, blocks, 3, width)
  const Bits16 *b_c, *b_g, *b_x, *b_y;
  const Bits16 *b_h[kMostBlocks], *b_o[kMostBlocks];
  WeightMatrix weights[kBlockWeights + 2 * kMostBlocks];
  const int64_t *seed, *step, *sample_ids;
  int64_t stream;
  bool noisy;
  unsigned char* scratch;  // saved.bytes for each block of threads, or split.exchange words for each group
  SharedPlan shared;
  ScratchPlan saved;
  SplitPlan split;
};

// How the copy engine reads a weight; filled by the driver.
struct alignas(128) TensorMap {
  unsigned char bytes[128];
};
struct TensorMaps {
  TensorMap of[kBlockWeights + 2 * kMostBlocks];
};

// The two sizes that are compiled: rows of a tile, the widest rows in panels of kTileRows, slots of the ring.
constexpr int kTallRows = 64, kTallPanels = 4, kTallStages = 4;
constexpr int kWideRows = 32, kWidePanels = 8, kWideStages = 3;

// A few rows: at most so many groups, and words that they exchange. On an H100 a stage of five steps for 128 rows takes
// 0.44 ms in eight groups, for 256 in sixteen 0.76 ms.
constexpr int kMostGroups = 8;
constexpr int64_t kMostExchange = int64_t{1} << 25;

enum class ChainKernel { none, tall, wide, split, hopper };

struct ChainPlan {
  ChainKernel kernel;
  int blocks;    // of threads
  int room = 0;  // bytes of shared memory that a block may have
};

// Blocks of threads of each group of 16 rows, or 0 where another kernel is better: groups share the processors, and each
// reads all weights in every step once they are too many for its shared memory.
SEDA_BOTH int split_blocks(const ChainShape& s, int64_t rows, int processors, int room) {
  const int64_t groups = (rows + kSplitRows - 1) / kSplitRows;
  if (groups > kMostGroups || groups > processors) return 0;
  int widest = s.width > s.hidden ? s.width : s.hidden;
  widest = (widest > s.dim ? widest : s.dim) / kSplitColumns;
  const int share = processors / static_cast<int>(groups > 0 ? groups : 1), blocks = widest < share ? widest : share;
  const SplitPlan plan = plan_split(s, rows, blocks, room);
  const bool fits = plan.weights <= static_cast<uint32_t>(room) && plan.exchange * groups <= kMostExchange;
  return fits ? blocks : 0;
}

// How a call is spread over a GPU with so many processors, each with so much shared memory for a block of threads.
SEDA_BOTH ChainPlan choose_plan(const ChainShape& s, int64_t rows, int processors, int room,
                                bool hopper) {
  const bool any = s.width % kSlice == 0 && s.hidden % kSlice == 0 && s.dim % 8 == 0 && s.condition_dim % 8 == 0 &&
                   s.dim > 0 && s.condition_dim > 0 && s.width > 0 && s.hidden > 0 && s.blocks > 0 && s.steps > 0 &&
                   s.width <= kMostWidth && s.blocks <= kMostBlocks;
  const auto fits = [&s, room](int tile, int panels, int stages) {
    return s.width <= panels * kTileRows && plan_shared(s, tile, stages).bytes <= static_cast<uint32_t>(room);
  };
  if (!any) return {ChainKernel::none, 0};
  const int group = split_blocks(s, rows, processors, room);
  if (group > 0) return {ChainKernel::split, group * static_cast<int>((rows + kSplitRows - 1) / kSplitRows), room};
  const bool tall = fits(kTallRows, kTallPanels, kTallStages), wide = fits(kWideRows, kWidePanels, kWideStages);
  if (!tall && !wide) return {ChainKernel::none, 0};
  // Few rows go in low tiles, so that more processors have some.
  const bool choose_tall = tall && (!wide || rows > int64_t{kWideRows} * processors);
  const int64_t tiles = (rows + (choose_tall ? kTallRows : kWideRows) - 1) / (choose_tall ? kTallRows : kWideRows);
  const int blocks = static_cast<int>(tiles < processors ? tiles : processors);
  // Blocks of threads go in pairs there.
  if (choose_tall && hopper && blocks >= 2) return {ChainKernel::hopper, blocks / 2 * 2};
  return {choose_tall ? ChainKernel::tall : ChainKernel::wide, blocks};
}

// Sets where things lie; how much of `scratch` the launch needs, in bytes.
SEDA_BOTH int64_t complete(ChainLaunch& launch, const ChainPlan& plan) {
  if (plan.kernel == ChainKernel::split) {
    const auto groups = static_cast<int>((launch.rows + kSplitRows - 1) / kSplitRows);
    launch.split = plan_split(launch.shape, launch.rows, plan.blocks / groups, plan.room);
    launch.shared.bytes = launch.split.bytes;
    return launch.split.exchange * groups * 4;
  }
  const bool tall = plan.kernel == ChainKernel::tall || plan.kernel == ChainKernel::hopper;
  launch.shared = plan_shared(launch.shape, tall ? kTallRows : kWideRows, tall ? kTallStages : kWideStages);
  launch.saved = plan_scratch(launch.shape, tall ? kTallRows : kWideRows);
  return launch.saved.bytes * plan.blocks;
}

// Null, or what CUDA says went wrong.
const char* plan_chain(const ChainShape& shape, int64_t rows, int device, ChainPlan& plan);
const char* launch_chain(const ChainLaunch& launch, const ChainPlan& plan, int device, void* stream);
const char* launch_hopper(const ChainLaunch& launch, int blocks, int device, void* stream);

}  // namespace seda

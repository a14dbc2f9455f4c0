// The reverse chain's order of work: which weight tiles it reads, in which order, and where bytes lie in shared memory.
// Plain functions for device and host.
//
// A stage is a row of legs. Each multiplies a block's rows by a "narrow" matrix, a chunk of its outputs at a time, and
// feeds each chunk at once to a "wide" matrix, whose sums stay in registers until the leg ends:
//
//     condition              -> w_c                     embed
//     n(c')    -> w_g (one leg a block)                 gates
//     x        -> w_x                                   input
//     z        -> w_h[l] -> silu, gate -> w_o[l]        block l, of each step
//     n(h_L)   -> w_y -> sampler's update -> w_x        between two steps
//     n(h_L)   -> w_y                                   after the last step
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define SEDA_BOTH __host__ __device__ __forceinline__
#else
#define SEDA_BOTH inline
#endif

namespace seda {

// A weight tile: kTileRows outputs by kSlice inputs. A chunk of a leg's inner dimension has kTileRows columns.
constexpr int kTileRows = 128, kSlice = 64, kSliceBytes = 2 * kSlice;
constexpr int kTileBytes = kTileRows * kSliceBytes;
constexpr int kMostBlocks = 32, kMostWidth = 1024;

SEDA_BOTH int pieces(int size, int piece) { return (size + piece - 1) / piece; }

// Of a buffer of rows of 128 bytes: where the 16 bytes number `chunk` of a row lie. Eight rows' equal chunks fall on
// different banks, in the pattern that the copy engine calls "128B swizzle".
SEDA_BOTH uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(row * kSliceBytes + ((chunk ^ (row & 7)) << 4));
}

// What a warpgroup's product is told of an operand: rows of 128 bytes in that swizzle, eight of them every 1024 bytes. Bits
// 0-13 hold the address, 16-29 an offset that this swizzle does not use, 32-45 that of the next eight rows, all in units
// of 16 bytes; 49-51 are 0 where the pattern starts at multiples of 1024 bytes; 62-63 name the swizzle.
SEDA_BOTH uint64_t describe_operand(uint32_t address) {
  return uint64_t{(address & 0x3FFFFu) >> 4} | uint64_t{1} << 16 | uint64_t{8 * kSliceBytes / 16} << 32 | uint64_t{1} << 62;
}

struct ChainShape {
  int dim, condition_dim, width, hidden, blocks, steps;
};

// Weights by number: w_c, w_g, w_x, w_y, then w_h and w_o of each block.
enum Weight { kNone = -1, kConditionWeight, kGateWeight, kInputWeight, kOutputWeight, kBlockWeights };

enum class LegKind { embed, gates, input, block, between, last };

struct Leg {
  LegKind kind;
  int narrow, wide;  // weights
  int inner;         // columns between the two
  int first_row;     // of the narrow matrix
  int step, block;
};

SEDA_BOTH int count_legs(const ChainShape& s) { return 2 + s.blocks + s.steps * (s.blocks + 1); }

SEDA_BOTH Leg leg_at(const ChainShape& s, int n) {
  if (n == 0) return {LegKind::embed, kNone, kConditionWeight, s.condition_dim, 0, 0, 0};
  if (n <= s.blocks) return {LegKind::gates, kGateWeight, kNone, s.hidden, (n - 1) * s.hidden, 0, n - 1};
  if (n == s.blocks + 1) return {LegKind::input, kNone, kInputWeight, s.dim, 0, 0, 0};
  const int step = (n - s.blocks - 2) / (s.blocks + 1), block = (n - s.blocks - 2) % (s.blocks + 1);
  if (block < s.blocks)
    return {LegKind::block, kBlockWeights + 2 * block, kBlockWeights + 2 * block + 1, s.hidden, 0, step, block};
  if (step + 1 < s.steps) return {LegKind::between, kOutputWeight, kInputWeight, s.dim, 0, step, block};
  return {LegKind::last, kOutputWeight, kNone, s.dim, 0, step, block};
}

// Slices of a chunk that hold columns of the inner dimension; the rest of the chunk is not multiplied.
SEDA_BOTH int slices_of_chunk(int inner, int chunk) {
  const int left = pieces(inner - chunk * kTileRows, kSlice);
  return left < kTileRows / kSlice ? left : kTileRows / kSlice;
}

struct WeightTile {
  int weight, row, column;
};

// The weight tiles in the order in which the legs use them, for so many passes; no tile is left when it is done.
class TileStream {
 public:
  SEDA_BOTH TileStream(const ChainShape& shape, int64_t passes)
      : shape_(shape), passes_left_(static_cast<int>(passes)), in_narrow_(leg_at(shape, 0).narrow != kNone) {}

  SEDA_BOTH bool done() const { return passes_left_ == 0; }

  SEDA_BOTH WeightTile next() {
    // Made anew for each tile: its fields would stay in registers.
    const Leg leg = leg_at(shape_, number_);
    if (in_narrow_) {
      const WeightTile tile{leg.narrow, leg.first_row + chunk_ * kTileRows, slice_ * kSlice};
      if (++slice_ < shape_.width / kSlice) return tile;
      slice_ = 0;
      if (leg.wide == kNone) end_chunk(leg);
      else in_narrow_ = false;
      return tile;
    }
    const WeightTile tile{leg.wide, panel_ * kTileRows, chunk_ * kTileRows + slice_ * kSlice};
    if (++panel_ < pieces(shape_.width, kTileRows)) return tile;
    panel_ = 0;
    if (++slice_ == slices_of_chunk(leg.inner, chunk_)) end_chunk(leg);
    return tile;
  }

 private:
  SEDA_BOTH void end_chunk(const Leg& leg) {
    slice_ = 0;
    in_narrow_ = leg.narrow != kNone;
    if (++chunk_ < pieces(leg.inner, kTileRows)) return;
    chunk_ = 0;
    if (++number_ == count_legs(shape_)) number_ = 0, --passes_left_;
    in_narrow_ = leg_at(shape_, number_).narrow != kNone;
  }

  const ChainShape& shape_;
  int passes_left_;
  bool in_narrow_;
  int number_ = 0, chunk_ = 0, slice_ = 0, panel_ = 0;
};

SEDA_BOTH int64_t tiles_of_a_pass(const ChainShape& s) {
  int64_t tiles = 0;
  for (int n = 0; n < count_legs(s); ++n) {
    const Leg leg = leg_at(s, n);
    if (leg.narrow != kNone) tiles += int64_t{pieces(leg.inner, kTileRows)} * (s.width / kSlice);
    if (leg.wide != kNone) tiles += int64_t{pieces(leg.inner, kSlice)} * pieces(s.width, kTileRows);
  }
  return tiles;
}

// Bytes of a block's shared memory: normed rows, one chunk, the ring of weight tiles, two sums for each row and warp, and two
// barriers for each slot.
struct SharedPlan {
  uint32_t normed, chunk, ring, sums, barriers, bytes;
};

SEDA_BOTH SharedPlan plan_shared(const ChainShape& s, int rows, int stages) {
  SharedPlan plan{};
  const auto slice = static_cast<uint32_t>(rows * kSliceBytes);
  plan.chunk = plan.normed + slice * static_cast<uint32_t>(s.width / kSlice);
  plan.ring = plan.chunk + slice * (kTileRows / kSlice);
  plan.sums = plan.ring + static_cast<uint32_t>(stages * kTileBytes);
  plan.barriers = plan.sums + static_cast<uint32_t>(rows * 2 * 4 * 4);
  plan.bytes = plan.barriers + static_cast<uint32_t>(stages * 16);
  return plan;
}

// What a block keeps in global memory between legs, each value written and read by one thread alone. Counted in groups
// of four values a thread; a region of one 128-column chunk of float32 is `rows * kTileRows` values.
struct ScratchPlan {
  int64_t hidden_state, condition, x, total, gates, bytes;  // byte offsets
};

SEDA_BOTH ScratchPlan plan_scratch(const ChainShape& s, int rows) {
  ScratchPlan plan{};
  const int64_t chunk = int64_t{rows} * kTileRows * 4;
  plan.condition = plan.hidden_state + chunk * pieces(s.width, kTileRows);
  plan.x = plan.condition + chunk * pieces(s.width, kTileRows);
  plan.total = plan.x + chunk * pieces(s.dim, kTileRows);
  plan.gates = plan.total + chunk * pieces(s.dim, kTileRows);
  plan.bytes = plan.gates + chunk / 2 * pieces(s.hidden, kTileRows) * s.blocks;
  return plan;
}

// ---- a few rows ------------------------------------------------------------------------------------------------------

// Rows that a group of blocks of threads has, the outputs of one product by one block, the threads of a block and the inner
// columns that they multiply in one step.
constexpr int kSplitRows = 16, kSplitColumns = 8, kSplitThreads = 256, kSplitStep = kSplitThreads;

SEDA_BOTH int widest_row(const ChainShape& s) {
  int widest = s.dim > s.condition_dim ? s.dim : s.condition_dim;
  widest = widest > s.width ? widest : s.width;
  return widest > s.hidden ? widest : s.hidden;
}

// Bytes from row to row: half of the banks' 128 bytes beside the other half, as eight lanes load 64 bytes of two rows at
// a time.
SEDA_BOTH uint32_t split_stride(const ChainShape& s) { return static_cast<uint32_t>(pieces(2 * widest_row(s), 128) * 128 + 64); }

// Where a row's 16 bytes number `chunk` lie.
SEDA_BOTH uint32_t split_place(uint32_t stride, int row, int chunk) {
  return static_cast<uint32_t>(row) * stride + static_cast<uint32_t>(16 * chunk);
}

// How a group of so many blocks of threads works. In shared memory: the rows, two rooms for each warp's part of the sums,
// what threads keep for themselves of each tile, and 16 bytes a thread for each slot of weights: first those that every step
// needs. In global memory: 32-bit words that are exchanged.
struct SplitPlan {
  int blocks, rows;  // of a group; rows of a region of what is exchanged
  int width_tiles, hidden_tiles, dim_tiles;
  int step_slots, slots;  // what the steps need; what there is room for
  uint32_t stride, sums, own, weights, bytes;
  int64_t exchange, exchange_of_step;
};

SEDA_BOTH SplitPlan plan_split(const ChainShape& s, int64_t rows, int blocks, int room) {
  SplitPlan plan{};
  plan.blocks = blocks, plan.rows = rows < kSplitRows ? static_cast<int>(rows) : kSplitRows;
  plan.width_tiles = pieces(s.width / kSplitColumns, blocks), plan.hidden_tiles = pieces(s.hidden / kSplitColumns, blocks);
  plan.dim_tiles = pieces(s.dim / kSplitColumns, blocks);
  plan.stride = split_stride(s);
  plan.sums = kSplitRows * plan.stride;
  plan.own = plan.sums + 2 * kSplitThreads / 32 * kSplitRows * kSplitColumns * 4;
  const int kept = 2 * plan.width_tiles + 2 * plan.dim_tiles + s.blocks * plan.hidden_tiles;
  plan.weights = plan.own + static_cast<uint32_t>(kept * kSplitRows * kSplitColumns * 4);
  const int of_width = pieces(s.width, kSplitStep), of_hidden = pieces(s.hidden, kSplitStep);
  plan.step_slots = plan.width_tiles * (pieces(s.dim, kSplitStep) + s.blocks * of_hidden) +
                    s.blocks * plan.hidden_tiles * of_width + plan.dim_tiles * of_width;
  const int all = plan.step_slots + plan.width_tiles * pieces(s.condition_dim, kSplitStep) +
                  s.blocks * plan.hidden_tiles * of_width;
  const int fit = (room - static_cast<int>(plan.weights)) / (16 * kSplitThreads);
  plan.slots = fit < 0 ? 0 : fit < all ? fit : all;
  plan.bytes = plan.weights + static_cast<uint32_t>(plan.slots * 16 * kSplitThreads);
  plan.exchange_of_step = int64_t{plan.rows} * ((s.blocks + 1) * s.width + s.blocks * (s.hidden / 2) + s.dim / 2);
  plan.exchange = int64_t{plan.rows} * s.width + s.steps * plan.exchange_of_step;
  return plan;
}

}  // namespace seda

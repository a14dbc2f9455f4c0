// The chain's engine for compute capability 9.0: the copy engine brings each weight tile once for two blocks of threads
// (a cluster; each brings one half and sends it to both), and warpgroups multiply straight from shared memory. One warp
// copies, two warpgroups multiply; they wait for each other at barriers in shared memory, two for each slot of the ring.
#pragma once

#include "reverse_chain.h"

namespace seda {

constexpr int kHopperConsumers = 256, kHopperThreads = 384, kHopperRanks = 2;

// Where a slot's barriers lie: one for "full" and one for "empty".
SEDA_KERNEL uint32_t full_barrier(const ChainLaunch& a, int slot) {
  return machine::shared_base() + a.shared.barriers + static_cast<uint32_t>(16 * slot);
}
SEDA_KERNEL uint32_t empty_barrier(const ChainLaunch& a, int slot) { return full_barrier(a, slot) + 8; }

// A slot of the ring, and whether the ring has been gone round an odd number of times.
struct RingPlace {
  int slot = 0;
  uint32_t odd = 0;
  SEDA_KERNEL void advance() {
    if (++slot == kTallStages) slot = 0, odd ^= 1u;
  }
};

// Both blocks of a cluster make as many passes, the last of which may have no rows.
SEDA_KERNEL int64_t hopper_passes(const ChainLaunch& a) {
  const int64_t tiles = (a.rows + kTallRows - 1) / kTallRows;
  const int first = machine::block() - machine::block() % kHopperRanks;
  return (tiles - first + machine::blocks() - 1) / machine::blocks();
}

class HopperEngine {
 public:
  // The first warpgroup has the first half of a tile's outputs, the second the others; both have all 64 rows.
  static constexpr int kThreads = kHopperConsumers, kRowsOfTile = kTallRows, kPanelsOfRow = kTallPanels;
  static constexpr int kWarpColumns = 2, kMt = 1, kNt = kTileRows / kWarpColumns / 8;
  using Sums = float[kMt][kNt][4];

  SEDA_KERNEL explicit HopperEngine(const ChainLaunch& launch) : a_(launch) {}

  SEDA_KERNEL static int first_row(int thread) { return thread / 32 % 4 * 16; }
  SEDA_KERNEL static int warp_column(int thread) { return thread / 128; }
  SEDA_KERNEL int64_t passes() const { return hopper_passes(a_); }
  SEDA_KERNEL void begin() {}

  SEDA_KERNEL void sync() { machine::consumers_barrier(); }
  // The other warpgroup has multiplied the chunk before this one.
  SEDA_KERNEL void before_chunk(int chunk, bool) {
    if (chunk > 0) machine::consumers_barrier();
  }
  // What all have written is seen by the matrix units.
  SEDA_KERNEL void after_writes() {
    machine::publish_to_matrix_units();
    machine::consumers_barrier();
  }

  SEDA_KERNEL void multiply(Sums& sums, uint32_t rows) {
    machine::wait_phase(full_barrier(a_, place_.slot), place_.odd);
    const uint32_t tile = machine::shared_base() + a_.shared.ring + static_cast<uint32_t>(place_.slot * kTileBytes) +
                          static_cast<uint32_t>(machine::thread() / 128 * (kTileBytes / 2));
    machine::group_products_begin();
#pragma unroll
    for (int k = 0; k < kSlice / 16; ++k)
      machine::group_multiply_add(sums[0], describe_operand(rows + static_cast<uint32_t>(32 * k)),
                                  describe_operand(tile + static_cast<uint32_t>(32 * k)));
    machine::group_products_end();
    // Each warp frees the slot in both blocks: both write into each.
    if (machine::thread() % 32 < kHopperRanks)
      machine::arrive_at_rank(empty_barrier(a_, place_.slot), machine::thread() % 32);
    place_.advance();
  }

 private:
  const ChainLaunch& a_;
  RingPlace place_;
};

using HopperChain = ChainThread<HopperEngine>;

// What the copying warp's first thread does.
SEDA_KERNEL void copy_weights(const ChainLaunch& a, const TensorMap* maps) {
  TileStream stream(a.shape, hopper_passes(a));
  const int rank = machine::block() % kHopperRanks;
  for (RingPlace place; !stream.done(); place.advance()) {
    const WeightTile tile = stream.next();
    // The phase before the first counts as over: the slots begin empty.
    machine::wait_phase(empty_barrier(a, place.slot), place.odd ^ 1u);
    const uint32_t full = full_barrier(a, place.slot), half = kTileBytes / kHopperRanks;
    machine::arrive_expecting(full, kTileBytes);
    machine::copy_to_cluster(
        machine::shared_base() + a.shared.ring + static_cast<uint32_t>(place.slot * kTileBytes) +
            static_cast<uint32_t>(rank) * half,
        &maps[tile.weight], tile.column, tile.row + rank * (kTileRows / kHopperRanks), full);
  }
}

// A block of threads of the whole kernel.
SEDA_KERNEL void run_hopper(const ChainLaunch& a, const TensorMap* maps) {
  if (machine::thread() == 0) {
    for (int slot = 0; slot < kTallStages; ++slot) {
      machine::start_barrier(full_barrier(a, slot), 1);
      machine::start_barrier(empty_barrier(a, slot), kHopperRanks * kHopperConsumers / 32);
    }
  }
  machine::cluster_meet();
  if (machine::thread() < kHopperConsumers) {
    machine::take_registers();
    HopperChain thread(a);
    thread.run();
  } else {
    machine::give_registers();
    if (machine::thread() == kHopperConsumers) copy_weights(a, maps);
  }
  // No block leaves while the other may still send to it.
  machine::cluster_meet();
}

}  // namespace seda

// The reverse chain's kernel, one launch for a whole stage: a tile of rows stays on one block of threads through all
// legs of the stage (schedule.h) while the weights stream past through a ring of tiles in shared memory. Sums are
// float32 in registers; operands of the products are bfloat16. Written against machine.h, so that the same text runs on
// a GPU and, thread by thread, on the host. The formulas are reference.reverse_chain's.
#pragma once

#include "normals.h"
#include "reverse_chain_launch.h"

namespace seda {

struct alignas(16) Four {
  float at[4];
};
struct alignas(8) Two {
  uint32_t at[2];
};

// How the weights come and the products are made, here with what every GPU from compute capability 8.0 on has: all
// threads copy weight tiles into the ring, some tiles ahead, and each warp multiplies its part. kRows rows, widths up to
// kPanels * kTileRows.
template <int kRows, int kPanels, int kStages>
class RingEngine {
 public:
  // Warps stand two by four: each has half of the rows and a quarter of a tile's 128 outputs.
  static constexpr int kThreads = 256, kRowsOfTile = kRows, kPanelsOfRow = kPanels;
  static constexpr int kWarpColumns = 4, kMt = kRows / 32, kNt = kTileRows / kWarpColumns / 8;
  using Sums = float[kMt][kNt][4];

  SEDA_KERNEL explicit RingEngine(const ChainLaunch& launch)
      : a_(launch),
        stream_(launch.shape, passes()),
        shared_(machine::shared_base()),
        lane_(machine::thread() % 32),
        row0_(first_row(machine::thread())),
        column0_(warp_column(machine::thread()) * (kTileRows / kWarpColumns)) {}

  SEDA_KERNEL static int first_row(int thread) { return thread / 32 / kWarpColumns * (kRows / 2); }
  SEDA_KERNEL static int warp_column(int thread) { return thread / 32 % kWarpColumns; }

  // Row tiles that this block of threads works on.
  SEDA_KERNEL int64_t passes() const {
    const int64_t tiles = (a_.rows + kRows - 1) / kRows;
    return (tiles - machine::block() + machine::blocks() - 1) / machine::blocks();
  }

  SEDA_KERNEL void begin() {
    for (int i = 0; i + 1 < kStages; ++i) copy_next_tile();
  }

  SEDA_KERNEL void sync() { machine::barrier(); }
  // The chunk before this one has been read by all; there is a barrier between where a narrow product stands.
  SEDA_KERNEL void before_chunk(int chunk, bool narrow) {
    if (chunk > 0 && !narrow) machine::barrier();
  }
  // What was written to shared memory is seen after the next tile's barrier.
  SEDA_KERNEL void after_writes() {}

  // sums += rows (kRows x kSlice, in shared memory) times the next weight tile, turned.
  SEDA_KERNEL void multiply(Sums& sums, uint32_t rows) {
    const uint32_t tile = next_tile();
#pragma unroll
    for (int k = 0; k < kSlice / 16; ++k) {
      uint32_t a[kMt][4], b[kNt / 2][4];
#pragma unroll
      for (int i = 0; i < kMt; ++i)
        machine::load_matrices(a[i], rows + swizzled(row0_ + 16 * i + lane_ % 16, 2 * k + lane_ / 16));
#pragma unroll
      for (int j = 0; j < kNt / 2; ++j)
        machine::load_matrices(
            b[j], tile + swizzled(column0_ + 16 * j + lane_ / 16 * 8 + lane_ % 8, 2 * k + lane_ / 8 % 2));
#pragma unroll
      for (int i = 0; i < kMt; ++i)
#pragma unroll
        for (int j = 0; j < kNt; ++j)
          machine::multiply_add(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

 private:
  // Starts the copy of the stream's next tile into its slot, or ends an empty group so that the count goes on.
  SEDA_KERNEL void copy_next_tile() {
    if (!stream_.done()) {
      const WeightTile tile = stream_.next();
      const WeightMatrix& weight = a_.weights[tile.weight];
      const uint32_t slot = shared_ + a_.shared.ring + static_cast<uint32_t>(copied_slot_ * kTileBytes);
      const int chunk = machine::thread() % 8, column = tile.column + 8 * chunk;
      for (int row = machine::thread() / 8; row < kTileRows; row += kThreads / 8) {
        const bool real = tile.row + row < weight.rows && column < weight.columns;
        const int64_t at = real ? int64_t{tile.row + row} * weight.columns + column : 0;
        machine::copy16(slot + swizzled(row, chunk), weight.data + at, real);
      }
      copied_slot_ = copied_slot_ + 1 == kStages ? 0 : copied_slot_ + 1;
    }
    machine::copies_end_group();
  }

  // The next tile in shared memory, seen by all; the slot of the tile before it is free and gets a new one.
  SEDA_KERNEL uint32_t next_tile() {
    machine::copies_wait<kStages - 2>();
    machine::barrier();
    copy_next_tile();
    const uint32_t slot = shared_ + a_.shared.ring + static_cast<uint32_t>(used_slot_ * kTileBytes);
    used_slot_ = used_slot_ + 1 == kStages ? 0 : used_slot_ + 1;
    return slot;
  }

  const ChainLaunch& a_;
  TileStream stream_;
  uint32_t shared_;
  int lane_, row0_, column0_;
  int copied_slot_ = 0, used_slot_ = 0;
};

// One thread of a block of Engine::kThreads.
template <class Engine>
class ChainThread {
 public:
  static constexpr int kThreads = Engine::kThreads, kRows = Engine::kRowsOfTile, kPanels = Engine::kPanelsOfRow;
  static constexpr int kMt = Engine::kMt, kNt = Engine::kNt, kWarpColumns = Engine::kWarpColumns;
  using Sums = typename Engine::Sums;

  SEDA_KERNEL explicit ChainThread(const ChainLaunch& launch)
      : a_(launch),
        engine_(launch),
        shared_(machine::shared_base()),
        place_(machine::thread()),
        scratch_(launch.scratch + machine::block() * launch.saved.bytes) {}

  SEDA_KERNEL void run() {
    engine_.begin();
    first_row_ = int64_t{kRows} * machine::block();
    for (auto left = static_cast<int>(engine_.passes()); left > 0; --left) {
      started_ = false;
      for (int n = 0; n < count_legs(a_.shape); ++n) run_leg(leg_at(a_.shape, n));
      first_row_ += int64_t{kRows} * machine::blocks();
    }
  }

 private:
  SEDA_KERNEL static void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int j = 0; j < kNt; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) sums[i][j][v] = 0.0f;
  }

  // ---- a leg ---------------------------------------------------------------------------------------------------

  SEDA_KERNEL void run_leg(const Leg& leg) {
    if (leg.wide != kNone)
#pragma unroll
      for (int p = 0; p < kPanels; ++p) clear(wide_[p]);
    for (int chunk = 0; chunk < pieces(leg.inner, kTileRows); ++chunk) {
      if (leg.narrow == kNone) {
        engine_.before_chunk(chunk, false);
        read_rows(leg, chunk);
      } else {
        clear(narrow_);
        for (int s = 0; s < a_.shape.width / kSlice; ++s)
          engine_.multiply(narrow_, shared_ + a_.shared.normed + static_cast<uint32_t>(s * kRows * kSliceBytes));
        if (leg.wide != kNone) engine_.before_chunk(chunk, true);
        finish_chunk(leg, chunk);
      }
      if (leg.wide == kNone) continue;
      engine_.after_writes();
      for (int s = 0; s < slices_of_chunk(leg.inner, chunk); ++s) {
        const uint32_t rows = shared_ + a_.shared.chunk + static_cast<uint32_t>(s * kRows * kSliceBytes);
#pragma unroll
        for (int p = 0; p < kPanels; ++p)
          if (p < pieces(a_.shape.width, kTileRows)) engine_.multiply(wide_[p], rows);
      }
    }
    if (leg.wide == kNone) return;
    finish_leg(leg);
    engine_.after_writes();
  }

  // ---- chunks: what stands between the narrow and the wide product ---------------------------------------------

  // Addresses beside the products are made anew from here each time: kept, they would not leave registers for the sums.
  SEDA_KERNEL void forget_addresses() {
    machine::forget(place_);
    machine::forget(scratch_);
  }
  SEDA_KERNEL int row_of(int i, int half) const {
    return Engine::first_row(place_) + 16 * i + 8 * half + place_ % 32 / 4;
  }
  SEDA_KERNEL int column_of(int j) const { return warp_column() * (kTileRows / kWarpColumns) + 8 * j + 2 * (place_ % 4); }
  SEDA_KERNEL int warp_column() const { return Engine::warp_column(place_); }

  SEDA_KERNEL static float wide_bits(uint32_t bits16) { return float_of(bits16 << 16); }

  // Two neighbours of a vector of bfloat16.
  SEDA_KERNEL static void load_two(const Bits16* from, float& first, float& second) {
    const uint32_t two = machine::load(reinterpret_cast<const uint32_t*>(from));
    first = wide_bits(two & 0xFFFFu), second = float_of(two & 0xFFFF0000u);
  }

  // The same of a row of this tile and zero beyond its ends.
  SEDA_KERNEL void load_row(const Bits16* from, int64_t stride, int columns, int row, int column, float& first,
                            float& second) const {
    first = second = 0.0f;
    if (first_row_ + row < a_.rows && column < columns)
      load_two(from + (first_row_ + row) * stride + column, first, second);
  }

  // Where a thread's own values of a region lie: 16 (or 8) bytes beside those of its neighbours.
  template <class T>
  SEDA_KERNEL T* own(int64_t region, int chunk, int i, int j) const {
    const int64_t group = (int64_t{chunk} * kMt + i) * kNt + j;
    return reinterpret_cast<T*>(scratch_ + region) + group * kThreads + place_;
  }

  SEDA_KERNEL void store_chunk(int row, int column, float first, float second) const {
    const uint32_t slice = a_.shared.chunk + static_cast<uint32_t>(column / kSlice * kRows * kSliceBytes);
    const int inside = column % kSlice;
    machine::store_shared(shared_ + slice + swizzled(row, inside / 8) + static_cast<uint32_t>(inside % 8 * 2),
                          machine::pack(first, second));
  }

  // A chunk that comes from memory: the condition, or the initial state, which also becomes x.
  SEDA_KERNEL void read_rows(const Leg& leg, int chunk) {
    forget_addresses();
    const bool condition = leg.kind == LegKind::embed;
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int j = 0; j < kNt; ++j) {
        Four x;
        const int column = column_of(j);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          load_row(condition ? a_.condition : a_.initial, condition ? a_.condition_stride : a_.initial_stride,
                   leg.inner, row_of(i, half), chunk * kTileRows + column, x.at[2 * half], x.at[2 * half + 1]);
          store_chunk(row_of(i, half), column, x.at[2 * half], x.at[2 * half + 1]);
        }
        if (!condition) machine::store(own<Four>(a_.saved.x, chunk, i, j), x);
      }
  }

  SEDA_KERNEL void finish_chunk(const Leg& leg, int chunk) {
    forget_addresses();
    if (leg.kind == LegKind::gates) return save_gates(leg, chunk);
    if (leg.kind == LegKind::block) return gate_chunk(leg, chunk);
    update_chunk(leg, chunk);
    if (chunk + 1 == pieces(leg.inner, kTileRows)) started_ = started_ || machine::load(step_coefficients(leg.step) + 4) != 0.0f;
  }

  // g = 1 + w_g n(c') + b_g
  SEDA_KERNEL void save_gates(const Leg& leg, int chunk) {
#pragma unroll
    for (int j = 0; j < kNt; ++j) {
      forget_addresses();
      const int column = chunk * kTileRows + column_of(j);
      float b0 = 0.0f, b1 = 0.0f;
      if (column < leg.inner) load_two(a_.b_g + leg.first_row + column, b0, b1);
#pragma unroll
      for (int i = 0; i < kMt; ++i) {
        const float(&s)[4] = narrow_[i][j];
        const Two gates{{machine::pack(1.0f + s[0] + b0, 1.0f + s[1] + b1),
                         machine::pack(1.0f + s[2] + b0, 1.0f + s[3] + b1)}};
        machine::store(own<Two>(a_.saved.gates, gate_chunk_number(leg, chunk), i, j), gates);
      }
    }
  }

  SEDA_KERNEL int gate_chunk_number(const Leg& leg, int chunk) const {
    return leg.block * pieces(a_.shape.hidden, kTileRows) + chunk;
  }

  // u = silu(w_h z + b_h) * g
  SEDA_KERNEL void gate_chunk(const Leg& leg, int chunk) {
#pragma unroll
    for (int j = 0; j < kNt; ++j) {
      forget_addresses();
      const int column = chunk * kTileRows + column_of(j);
      float b0 = 0.0f, b1 = 0.0f;
      if (column < leg.inner) load_two(a_.b_h[leg.block] + column, b0, b1);
#pragma unroll
      for (int i = 0; i < kMt; ++i) {
        const Two gates = machine::load(own<Two>(a_.saved.gates, gate_chunk_number(leg, chunk), i, j));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t g = gates.at[half];
          const float u0 = machine::silu(narrow_[i][j][2 * half] + b0) * wide_bits(g & 0xFFFFu);
          const float u1 = machine::silu(narrow_[i][j][2 * half + 1] + b1) * float_of(g & 0xFFFF0000u);
          store_chunk(row_of(i, half), column_of(j), u0, u1);
        }
      }
    }
  }

  // (5,): a, b, c, e, w
  SEDA_KERNEL const float* step_coefficients(int step) const { return a_.coefficients + 5 * step; }

  // x0_hat = w_y n(h_L) + b_y; result += w x0_hat; x <- a x0_hat + b x + c source + e eps
  SEDA_KERNEL void update_chunk(const Leg& leg, int chunk) {
#pragma unroll
    for (int j = 0; j < kNt; ++j) {
      forget_addresses();
      const int column = chunk * kTileRows + column_of(j);
      const bool inside = column < leg.inner;
      float b0 = 0.0f, b1 = 0.0f;
      if (inside) load_two(a_.b_y + column, b0, b1);
#pragma unroll
      for (int i = 0; i < kMt; ++i) {
        const float(&s)[4] = narrow_[i][j];
        const Four estimate{{s[0] + b0, s[1] + b1, s[2] + b0, s[3] + b1}};
        const Four total = add_to_total(leg, estimate, own<Four>(a_.saved.total, chunk, i, j));
        if (leg.kind == LegKind::last)
          write_result(i, column, inside, total);
        else
          update_x(leg, estimate, own<Four>(a_.saved.x, chunk, i, j), i, j, column, inside);
      }
    }
  }

  SEDA_KERNEL Four add_to_total(const Leg& leg, const Four& estimate, Four* saved) const {
    const float w = machine::load(step_coefficients(leg.step) + 4);
    Four total{};
    if (started_) total = machine::load(saved);
    if (w == 0.0f) return total;
#pragma unroll
    for (int v = 0; v < 4; ++v) total.at[v] = fmaf(w, estimate.at[v], total.at[v]);
    if (leg.kind != LegKind::last) machine::store(saved, total);
    return total;
  }

  SEDA_KERNEL void write_result(int i, int column, bool inside, const Four& total) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row_ + row_of(i, half);
      if (inside && row < a_.rows)
        machine::store(reinterpret_cast<uint32_t*>(a_.result + row * a_.shape.dim + column),
                       machine::pack(total.at[2 * half], total.at[2 * half + 1]));
    }
  }

  SEDA_KERNEL void update_x(const Leg& leg, const Four& estimate, Four* saved, int i, int j, int column,
                            bool inside) const {
    const float* k = step_coefficients(leg.step);
    const float a = machine::load(k), b = machine::load(k + 1), c = machine::load(k + 2), e = machine::load(k + 3);
    Four x = machine::load(saved);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(i, half);
      float& x0 = x.at[2 * half];
      float& x1 = x.at[2 * half + 1];
      x0 = fmaf(a, estimate.at[2 * half], b * x0), x1 = fmaf(a, estimate.at[2 * half + 1], b * x1);
      if (c != 0.0f) {
        float s0, s1;
        load_row(a_.source, a_.source_stride, leg.inner, row, column, s0, s1);
        x0 = fmaf(c, s0, x0), x1 = fmaf(c, s1, x1);
      }
      if (a_.noisy && e != 0.0f && first_row_ + row < a_.rows) {
        const int64_t step = machine::load(a_.step) + 1 + leg.step;
        const PhiloxRow key(machine::load(a_.seed), step, machine::load(a_.sample_ids + first_row_ + row), a_.stream);
        float n0, n1;
        two_normals(key, static_cast<uint32_t>(column), n0, n1);
        x0 = fmaf(e, n0, x0), x1 = fmaf(e, n1, x1);
      }
      if (!inside) x0 = x1 = 0.0f;
      store_chunk(row, column_of(j), x0, x1);
    }
    machine::store(saved, x);
  }

  // ---- the end of a leg: a new state h and its norm -------------------------------------------------------------

  SEDA_KERNEL const float* modulation_of(int step, int block, int which) const {
    return a_.modulation + ((int64_t{step} * a_.shape.blocks + block) * 3 + which) * a_.shape.width;
  }

  SEDA_KERNEL void finish_leg(const Leg& leg) {
    forget_addresses();
    const int panels = pieces(a_.shape.width, kTileRows);
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      if (p < panels)
#pragma unroll
        for (int j = 0; j < kNt; ++j) new_state(leg, p, j);
    float mean[kMt][2], factor[kMt][2];
    row_sums(mean, nullptr, 0);
    const float inverse_width = 1.0f / static_cast<float>(a_.shape.width);
#pragma unroll
    for (int i = 0; i < kMt; ++i) mean[i][0] *= inverse_width, mean[i][1] *= inverse_width;
    row_sums(factor, mean, 1);
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        factor[i][half] = machine::inverse_root(fmaf(factor[i][half], inverse_width, 1e-5f));
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      if (p < panels)
#pragma unroll
        for (int j = 0; j < kNt; ++j) write_normed(leg, p, j, mean, factor);
  }

  // Sums of the leg's product become c', or h = w_x x + b_x + n(c'), or h + (1 + alpha) (w_o u + b_o); 0 beyond the width.
  SEDA_KERNEL void new_state(const Leg& leg, int panel, int j) {
    const int column = panel * kTileRows + column_of(j);
    const bool inside = column < a_.shape.width;
    const Bits16* bias = leg.kind == LegKind::embed ? a_.b_c : leg.kind == LegKind::block ? a_.b_o[leg.block] : a_.b_x;
    float b0 = 0.0f, b1 = 0.0f, scale0 = 1.0f, scale1 = 1.0f;
    if (inside) load_two(bias + column, b0, b1);
    if (inside && leg.kind == LegKind::block) {
      const float* alpha = modulation_of(leg.step, leg.block, 2) + column;
      scale0 += machine::load(alpha), scale1 += machine::load(alpha + 1);
    }
#pragma unroll
    for (int i = 0; i < kMt; ++i) {
      float(&s)[4] = wide_[panel][i][j];
      Four old{};
      if (leg.kind == LegKind::block) old = machine::load(own<Four>(a_.saved.hidden_state, panel, i, j));
      else if (leg.kind != LegKind::embed) old = machine::load(own<Four>(a_.saved.condition, panel, i, j));
      Four h;
#pragma unroll
      for (int v = 0; v < 4; ++v)
        h.at[v] = s[v] = inside ? fmaf(v % 2 ? scale1 : scale0, s[v] + (v % 2 ? b1 : b0), old.at[v]) : 0.0f;
      if (leg.kind != LegKind::embed) machine::store(own<Four>(a_.saved.hidden_state, panel, i, j), h);
    }
  }

  // For each of the thread's rows, over all columns: the sum, or with `mean` that of the squared distances from it.
  SEDA_KERNEL void row_sums(float (&sums)[kMt][2], const float (*mean)[2], int which) {
    const int panels = pieces(a_.shape.width, kTileRows);
    const uint32_t room = shared_ + a_.shared.sums + static_cast<uint32_t>(which * kRows * kWarpColumns * 4);
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < kPanels; ++p)
          if (p < panels)
#pragma unroll
            for (int j = 0; j < kNt; ++j)
#pragma unroll
              for (int v = 2 * half; v < 2 * half + 2; ++v) {
                const float value = wide_[p][i][j][v];
                const float distance = mean == nullptr ? 0.0f : value - mean[i][half];
                const bool inside = p * kTileRows + column_of(j) < a_.shape.width;
                sum += mean == nullptr ? value : inside ? distance * distance : 0.0f;
              }
        sum += machine::shuffle_xor(sum, 1);
        sum += machine::shuffle_xor(sum, 2);
        const int place = row_of(i, half) * kWarpColumns + warp_column();
        if (place_ % 4 == 0) machine::store_shared(room + static_cast<uint32_t>(4 * place), bits_of(sum));
      }
    engine_.sync();
#pragma unroll
    for (int i = 0; i < kMt; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums[i][half] = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarpColumns; ++w)
          sums[i][half] += float_of(
              machine::load_shared(room + static_cast<uint32_t>(4 * (row_of(i, half) * kWarpColumns + w))));
      }
  }

  // The next leg's rows: n(h) * (1 + scale) + shift of the block that comes, or the plain norm.
  SEDA_KERNEL void write_normed(const Leg& leg, int panel, int j, const float (&mean)[kMt][2],
                                const float (&factor)[kMt][2]) const {
    const int column = panel * kTileRows + column_of(j);
    if (column >= a_.shape.width) return;
    const bool starts_step = leg.kind == LegKind::input || leg.kind == LegKind::between;
    const int step = leg.kind == LegKind::between ? leg.step + 1 : leg.step;
    const int block = starts_step ? 0 : leg.block + 1;
    float scale0 = 1.0f, scale1 = 1.0f, shift0 = 0.0f, shift1 = 0.0f;
    if (leg.kind != LegKind::embed && block < a_.shape.blocks) {
      const float* shift = modulation_of(step, block, 0) + column;
      const float* scale = modulation_of(step, block, 1) + column;
      shift0 = machine::load(shift), shift1 = machine::load(shift + 1);
      scale0 += machine::load(scale), scale1 += machine::load(scale + 1);
    }
    const uint32_t slice = a_.shared.normed + static_cast<uint32_t>(column / kSlice * kRows * kSliceBytes);
#pragma unroll
    for (int i = 0; i < kMt; ++i) {
      Four z;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(i, half);
        z.at[2 * half] = (wide_[panel][i][j][2 * half] - mean[i][half]) * factor[i][half];
        z.at[2 * half + 1] = (wide_[panel][i][j][2 * half + 1] - mean[i][half]) * factor[i][half];
        const uint32_t place = slice + swizzled(row, column % kSlice / 8) + static_cast<uint32_t>(column % 8 * 2);
        machine::store_shared(shared_ + place, machine::pack(fmaf(z.at[2 * half], scale0, shift0),
                                                             fmaf(z.at[2 * half + 1], scale1, shift1)));
      }
      if (leg.kind == LegKind::embed) machine::store(own<Four>(a_.saved.condition, panel, i, j), z);
    }
  }

  const ChainLaunch& a_;
  Engine engine_;
  uint32_t shared_;
  int place_;  // this thread
  unsigned char* scratch_;
  int64_t first_row_ = 0;
  bool started_ = false;  // whether an estimate has been added to the total
  Sums narrow_, wide_[kPanels];
};

// More rows share a weight tile, or there is room for wider rows.
using TallChain = ChainThread<RingEngine<kTallRows, kTallPanels, kTallStages>>;
using WideChain = ChainThread<RingEngine<kWideRows, kWidePanels, kWideStages>>;

}  // namespace seda

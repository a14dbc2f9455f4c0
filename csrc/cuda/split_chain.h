// The reverse chain for a few rows, one launch for a whole stage: a group of blocks of threads spreads the columns, not the
// rows, over its processors. Each thread's own weights stay in shared memory for all steps, as far as there is room; gates,
// the condition's norm and the chain's state stay with the thread that made them. After each product the blocks exchange
// activations through global memory, where every word is sent once and holds kNothing before: who reads it waits until it is
// there, and blocks meet at no barrier. Written against machine.h like reverse_chain.h, whose formulas these are.
#pragma once

#include "normals.h"
#include "reverse_chain_launch.h"

namespace seda {

struct alignas(16) Words4 {
  uint32_t at[4];
};

class SplitThread {
 public:
  static constexpr int kThreads = kSplitThreads, kWarps = kThreads / 32;

  SEDA_KERNEL explicit SplitThread(const ChainLaunch& launch)
      : a_(launch),
        plan_(launch.split),
        shared_(machine::shared_base()),
        lane_(machine::thread() % 32),
        warp_(machine::thread() / 32),
        rank_(machine::block() % plan_.blocks),
        row_(machine::thread() / (kSplitColumns / 2)),
        pair_(machine::thread() % (kSplitColumns / 2) * 2),
        first_row_(int64_t{machine::block() / plan_.blocks} * kSplitRows) {
    const int64_t left = a_.rows - first_row_;
    rows_ = left < kSplitRows ? static_cast<int>(left) : kSplitRows;
    exchange_ = reinterpret_cast<uint32_t*>(a_.scratch) + machine::block() / plan_.blocks * plan_.exchange;
  }

  SEDA_KERNEL void run() {
    const ChainShape& s = a_.shape;
    const Product input = product(kInputWeight, 0, s.width, 0);
    bring_weights(input);
    for (int row = rows_; row < kSplitRows; ++row)
      for (int i = machine::thread(); i < static_cast<int>(plan_.stride / 16); i += kThreads)
        machine::store_shared4(shared_ + split_place(plan_.stride, row, i), {});
    machine::copies_wait<1>();
    embed();
    machine::copies_wait<0>();
    for (int step = 0; step < s.steps; ++step) {
      start_step(input, step);
      int slot = input.end;
      for (int block = 0; block < s.blocks; ++block) slot = run_block(step, block, slot);
      update(step, slot);
    }
  }

 private:
  struct Pair {
    float first, second;
  };

  // Rows of a weight, whose tiles of columns are dealt out to the blocks of a group; slots for what a thread needs of them.
  struct Product {
    WeightMatrix weight;
    int first, outputs, slot, steps, end;
  };

  SEDA_KERNEL Product product(int weight, int first, int outputs, int slot) const {
    Product p{a_.weights[weight], first, outputs, slot, pieces(a_.weights[weight].columns, kSplitStep), 0};
    p.end = slot + p.steps * pieces(outputs / kSplitColumns, plan_.blocks);
    return p;
  }

  // ---- phases --------------------------------------------------------------------------------------------------

  // c' = w_c c + b_c, its norm, and the gates.
  SEDA_KERNEL void embed() {
    const ChainShape& s = a_.shape;
    const Product condition = product(kConditionWeight, 0, s.width, plan_.step_slots);
    uint32_t* const sent = exchange_;
    phase(
        condition, [&] { read_rows(a_.condition, a_.condition_stride, s.condition_dim); },
        [&](int column) { return load_two(a_.b_c + column); },
        [&](int column, int, const Pair& sum, const Pair& bias) { send_state(sent, column, add(sum, bias)); });
    norm_rows(sent, nullptr, nullptr);
    for (int t = 0, column = own_column(); column < s.width; ++t, column += kSplitColumns * plan_.blocks)
      if (is_mine()) {
        const uint32_t place = split_place(plan_.stride, row_, column / 8) + static_cast<uint32_t>(column % 8 * 2);
        keep(t, unpack(machine::load_shared(shared_ + place)));
      }
    // Before the next rows are written; where there are gates their sums' barriers are.
    if (rank_ >= s.hidden / kSplitColumns) machine::barrier();
    int slot = condition.end;
    for (int block = 0; block < s.blocks; ++block) {
      const Product gates = product(kGateWeight, block * s.hidden, s.hidden, slot);
      phase(
          gates, [] {}, [&](int column) { return load_two(a_.b_g + gates.first + column); },
          [&](int, int t, const Pair& sum, const Pair& bias) {
            keep(own_gates(block) + t, {1.0f + sum.first + bias.first, 1.0f + sum.second + bias.second});
          });
      slot = gates.end;
    }
  }

  // h = w_x x + b_x + n(c')
  SEDA_KERNEL void start_step(const Product& input, int step) {
    const ChainShape& s = a_.shape;
    phase(
        input,
        [&] {
          if (step == 0) read_rows(a_.initial, a_.initial_stride, s.dim);
          else receive_rows(sent_x(step - 1), s.dim);
        },
        [&](int column) { return load_two(a_.b_x + column); },
        [&](int column, int t, const Pair& sum, const Pair& bias) {
          const Pair h = add(add(sum, bias), kept(t));
          keep(own_state() + t, h);
          send_state(sent_state(step, 0), column, h);
        });
  }

  SEDA_KERNEL int run_block(int step, int block, int slot) {
    const ChainShape& s = a_.shape;
    const float* modulation = a_.modulation + (int64_t{step} * s.blocks + block) * 3 * s.width;
    const Product inner = product(kBlockWeights + 2 * block, 0, s.hidden, slot);
    const Product outer = product(kBlockWeights + 2 * block + 1, 0, s.width, inner.end);
    uint32_t* const sent = sent_hidden(step, block);
    phase(
        inner, [&] { norm_rows(sent_state(step, block), modulation, modulation + s.width); },
        [&](int column) { return load_two(a_.b_h[block] + column); },
        [&](int column, int t, const Pair& sum, const Pair& bias) {
          const Pair z = add(sum, bias), gate = kept(own_gates(block) + t);
          send_two(sent, column, s.hidden, {machine::silu(z.first) * gate.first, machine::silu(z.second) * gate.second});
        });
    struct Known {
      Pair bias, alpha;
    };
    phase(
        outer, [&] { receive_rows(sent, s.hidden); },
        [&](int column) {
          const float* alpha = modulation + 2 * s.width + column;
          return Known{load_two(a_.b_o[block] + column), {machine::load(alpha), machine::load(alpha + 1)}};
        },
        [&](int column, int t, const Pair& sum, const Known& known) {
          const Pair change = add(sum, known.bias), before = kept(own_state() + t);
          const Pair h{fmaf(1.0f + known.alpha.first, change.first, before.first),
                       fmaf(1.0f + known.alpha.second, change.second, before.second)};
          keep(own_state() + t, h);
          send_state(sent_state(step, block + 1), column, h);
        });
    return outer.end;
  }

  struct Coefficients {
    Pair bias;
    float a, b, c, e, w;
  };

  // x0_hat = w_y n(h_L) + b_y; result += w x0_hat; x <- a x0_hat + b x + c source + e eps
  SEDA_KERNEL void update(int step, int slot) {
    const ChainShape& s = a_.shape;
    phase(
        product(kOutputWeight, 0, s.dim, slot), [&] { norm_rows(sent_state(step, s.blocks), nullptr, nullptr); },
        [&](int column) {
          const float* k = a_.coefficients + 5 * step;
          return Coefficients{load_two(a_.b_y + column), machine::load(k),     machine::load(k + 1),
                              machine::load(k + 2),      machine::load(k + 3), machine::load(k + 4)};
        },
        [&](int column, int t, const Pair& sum, const Coefficients& k) {
          const Pair estimate = add(sum, k.bias);
          Pair total{};
          if (step > 0) total = kept(own_total() + t);
          total = {fmaf(k.w, estimate.first, total.first), fmaf(k.w, estimate.second, total.second)};
          keep(own_total() + t, total);
          if (step + 1 < s.steps) update_x(step, column, t, estimate, k);
          else
            machine::store(reinterpret_cast<uint32_t*>(a_.result + (first_row_ + row_) * s.dim + column),
                           machine::pack(total.first, total.second));
        });
  }

  SEDA_KERNEL void update_x(int step, int column, int t, const Pair& estimate, const Coefficients& k) {
    const int64_t row = first_row_ + row_;
    Pair x = step == 0 ? load_two(a_.initial + row * a_.initial_stride + column) : kept(own_x() + t);
    x = {fmaf(k.a, estimate.first, k.b * x.first), fmaf(k.a, estimate.second, k.b * x.second)};
    if (k.c != 0.0f) {
      const Pair source = load_two(a_.source + row * a_.source_stride + column);
      x = {fmaf(k.c, source.first, x.first), fmaf(k.c, source.second, x.second)};
    }
    if (a_.noisy && k.e != 0.0f) {
      const PhiloxRow key(machine::load(a_.seed), machine::load(a_.step) + 1 + step, machine::load(a_.sample_ids + row),
                          a_.stream);
      Pair normal;
      two_normals(key, static_cast<uint32_t>(column), normal.first, normal.second);
      x = {fmaf(k.e, normal.first, x.first), fmaf(k.e, normal.second, x.second)};
    }
    keep(own_x() + t, x);
    send_two(sent_x(step), column, a_.shape.dim, x);
  }

  // ---- weights ---------------------------------------------------------------------------------------------------

  // Starts the copies of all weights that have a slot: first those that are needed first.
  SEDA_KERNEL void bring_weights(const Product& input) {
    const ChainShape& s = a_.shape;
    const Product condition = product(kConditionWeight, 0, s.width, plan_.step_slots);
    bring(condition);
    int slot = condition.end;
    for (int block = 0; block < s.blocks; ++block) {
      const Product gates = product(kGateWeight, block * s.hidden, s.hidden, slot);
      bring(gates), slot = gates.end;
    }
    machine::copies_end_group();
    bring(input);
    slot = input.end;
    for (int i = 0; i < 2 * s.blocks; ++i) {
      const Product part = product(kBlockWeights + i, 0, i % 2 ? s.width : s.hidden, slot);
      bring(part), slot = part.end;
    }
    bring(product(kOutputWeight, 0, s.dim, slot));
    machine::copies_end_group();
  }

  SEDA_KERNEL void bring(const Product& p) {
    int slot = p.slot;
    for (int tile = rank_; tile < p.outputs / kSplitColumns; tile += plan_.blocks)
      for (int i = 0; i < p.steps; ++i, ++slot)
        if (slot < plan_.slots && inner_column(i) < p.weight.columns)
          machine::copy16(slot_place(slot), weight_place(p, tile, i), true);
  }

  // The order of the inner columns inside 32 is that of 16-byte loads, for both operands; warps share the inner dimension.
  SEDA_KERNEL int inner_column(int i) const { return kSplitStep * i + 32 * warp_ + 8 * (lane_ % 4); }
  SEDA_KERNEL const Bits16* weight_place(const Product& p, int tile, int i) const {
    return p.weight.data + int64_t{p.first + tile * kSplitColumns + lane_ / 4} * p.weight.columns + inner_column(i);
  }
  SEDA_KERNEL uint32_t slot_place(int slot) const {
    return shared_ + plan_.weights + static_cast<uint32_t>(16 * (slot * kThreads + machine::thread()));
  }

  // Weights that are loaded together.
  static constexpr int kBatch = 4;

  SEDA_KERNEL void load_weights(const Product& p, int t, int batch, Words4 (&b)[kBatch]) const {
    const int tile = rank_ + t * plan_.blocks, first = batch * kBatch;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      b[i] = {};
      if (tile >= p.outputs / kSplitColumns || inner_column(first + i) >= p.weight.columns) continue;
      const int slot = p.slot + t * p.steps + first + i;
      if (slot < plan_.slots) machine::load_shared4(b[i].at, slot_place(slot));
      else b[i] = machine::load(reinterpret_cast<const Words4*>(weight_place(p, tile, first + i)));
    }
  }

  // ---- products --------------------------------------------------------------------------------------------------

  // The rows that `fill` puts in shared memory times a weight: use(column, t, sums, known) for each pair of this thread's
  // own columns, the t-th of them, with known = early(column) loaded ahead of what has to be waited for.
  template <class Fill, class Early, class Use>
  SEDA_KERNEL void phase(const Product& p, const Fill& fill, const Early& early, const Use& use) {
    if (rank_ >= p.outputs / kSplitColumns) return;
    Words4 b[kBatch];
    load_weights(p, 0, 0, b);
    decltype(early(0)) known{};
    if (is_mine()) known = early(own_column());
    fill();
    const int batches = pieces(p.steps, kBatch);
    for (int t = 0, column = own_column(); column < p.outputs; ++t, column += kSplitColumns * plan_.blocks) {
      if (t > 0 && is_mine()) known = early(column);
      float sums[4] = {};
      for (int batch = 0; batch < batches; ++batch) {
        const bool last = batch + 1 == batches;
        Words4 next[kBatch];
        load_weights(p, last ? t + 1 : t, last ? 0 : batch + 1, next);
        multiply(p, batch, b, sums);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) b[i] = next[i];
      }
      const Pair sum = over_warps(sums);
      if (is_mine()) use(column, t, sum, known);
    }
  }

  SEDA_KERNEL void multiply(const Product& p, int batch, const Words4 (&b)[kBatch], float (&sums)[4]) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int column = inner_column(batch * kBatch + i);
      if (column - 8 * (lane_ % 4) >= p.weight.columns) continue;
      Words4 low{}, high{};
      if (column < p.weight.columns) {
        machine::load_shared4(low.at, shared_ + split_place(plan_.stride, lane_ / 4, column / 8));
        machine::load_shared4(high.at, shared_ + split_place(plan_.stride, lane_ / 4 + 8, column / 8));
      }
      machine::multiply_add(sums, {low.at[0], high.at[0], low.at[1], high.at[1]}, b[i].at[0], b[i].at[1]);
      machine::multiply_add(sums, {low.at[2], high.at[2], low.at[3], high.at[3]}, b[i].at[2], b[i].at[3]);
    }
  }

  // A tile's sums of all warps for this thread's row and pair of columns. Two rooms in turn: the barrier between two tiles
  // is enough for both.
  SEDA_KERNEL Pair over_warps(const float (&sums)[4]) {
    room_ ^= 1u;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      machine::store_shared2(part(warp_, lane_ / 4 + 8 * half, 2 * (lane_ % 4)), bits_of(sums[2 * half]),
                             bits_of(sums[2 * half + 1]));
    machine::barrier();
    Pair sum{};
    if (!is_mine()) return sum;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      uint32_t two[2];
      machine::load_shared2(two, part(w, row_, pair_));
      sum = add(sum, {float_of(two[0]), float_of(two[1])});
    }
    return sum;
  }
  SEDA_KERNEL uint32_t part(int warp, int row, int column) const {
    const uint32_t number = ((room_ * kWarps + static_cast<uint32_t>(warp)) * kSplitRows + static_cast<uint32_t>(row)) *
                                kSplitColumns + static_cast<uint32_t>(column);
    return shared_ + plan_.sums + 4 * number;
  }

  // The first 16 x 4 threads have a row and two columns each of the tile's 16 x 8 sums.
  SEDA_KERNEL bool is_mine() const { return row_ < rows_; }
  SEDA_KERNEL int own_column() const { return rank_ * kSplitColumns + pair_; }
  SEDA_KERNEL static Pair add(const Pair& a, const Pair& b) { return {a.first + b.first, a.second + b.second}; }

  // ---- rows in shared memory -------------------------------------------------------------------------------------

  // Rows of a tensor.
  SEDA_KERNEL void read_rows(const Bits16* from, int64_t stride, int columns) {
    constexpr int kLoads = 8;
    const int pairs = columns / 2;
    for (int first = machine::thread(); first < rows_ * pairs; first += kLoads * kThreads) {
      uint32_t two[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = first + i * kThreads;
        if (at < rows_ * pairs)
          two[i] = machine::load(reinterpret_cast<const uint32_t*>(from + (first_row_ + at / pairs) * stride) + at % pairs);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = first + i * kThreads;
        if (at >= rows_ * pairs) break;
        const uint32_t inside = static_cast<uint32_t>(4 * (at % pairs));
        machine::store_shared(shared_ + split_place(plan_.stride, at / pairs, 0) + inside, two[i]);
      }
    }
    machine::barrier();
  }

  // Rows of bfloat16 that the group's blocks made together.
  SEDA_KERNEL void receive_rows(const uint32_t* sent, int columns) {
    constexpr int kLoads = 4;
    const int chunks = columns / 8, all = rows_ * chunks;
    for (int first = machine::thread(); first < all; first += kLoads * kThreads) {
      uint32_t got[kLoads][4];
      machine::receive(got, sent + 4 * first, 4 * kThreads, pieces(all - first, kThreads));
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = first + i * kThreads;
        if (at < all) machine::store_shared4(shared_ + split_place(plan_.stride, at / chunks, at % chunks), got[i]);
      }
    }
    machine::barrier();
  }

  // n(state) * (1 + scale) + shift; the plain norm without them. A warp norms two rows, others than it makes sums of.
  SEDA_KERNEL void norm_rows(const uint32_t* sent, const float* shift, const float* scale) {
    // The modulation of rows of up to 512 columns is loaded ahead of the wait; registers for more are wanting.
    constexpr int kQuads = kMostWidth / 128, kEarly = 4;
    const int width = a_.shape.width, quads = pieces(width - 4 * lane_, 128);
    Words4 by[kEarly], plus[kEarly];
#pragma unroll
    for (int i = 0; i < kEarly; ++i)
      if (shift != nullptr && i < quads) {
        by[i] = machine::load(reinterpret_cast<const Words4*>(scale + 128 * i + 4 * lane_));
        plus[i] = machine::load(reinterpret_cast<const Words4*>(shift + 128 * i + 4 * lane_));
      }
#pragma unroll 1
    for (int row = (warp_ + kWarps - 2) % kWarps; row < rows_; row += kWarps) {
      uint32_t h[kQuads][4];
      machine::receive(h, sent + row * width + 4 * lane_, 128, quads);
      float sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kQuads; ++i)
#pragma unroll
        for (int v = 0; v < 4; ++v) sum += i < quads ? float_of(h[i][v]) : 0.0f;
      const float mean = over_warp(sum) / static_cast<float>(width);
#pragma unroll
      for (int i = 0; i < kQuads; ++i)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const float distance = i < quads ? float_of(h[i][v]) - mean : 0.0f;
          squares = fmaf(distance, distance, squares);
        }
      const float factor = machine::inverse_root(over_warp(squares) / static_cast<float>(width) + 1e-5f);
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        if (i >= quads) break;
        Words4 times{}, more{};
        if (i < kEarly) times = by[i % kEarly], more = plus[i % kEarly];
        else if (shift != nullptr) {
          times = machine::load(reinterpret_cast<const Words4*>(scale + 128 * i + 4 * lane_));
          more = machine::load(reinterpret_cast<const Words4*>(shift + 128 * i + 4 * lane_));
        }
        float z[4];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          z[v] = (float_of(h[i][v]) - mean) * factor;
          if (shift != nullptr) z[v] = fmaf(z[v], 1.0f + float_of(times.at[v]), float_of(more.at[v]));
        }
        const uint32_t place = split_place(plan_.stride, row, 0) + static_cast<uint32_t>(2 * (128 * i + 4 * lane_));
        machine::store_shared2(shared_ + place, machine::pack(z[0], z[1]), machine::pack(z[2], z[3]));
      }
    }
    machine::barrier();
  }

  SEDA_KERNEL static float over_warp(float sum) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += machine::shuffle_xor(sum, mask);
    return sum;
  }

  // ---- exchange: regions of a group, one for each product whose results are exchanged ----------------------------

  SEDA_KERNEL uint32_t* of_step(int step) const {
    return exchange_ + int64_t{plan_.rows} * a_.shape.width + step * plan_.exchange_of_step;
  }
  SEDA_KERNEL uint32_t* sent_state(int step, int n) const {
    return of_step(step) + int64_t{n} * plan_.rows * a_.shape.width;
  }
  SEDA_KERNEL uint32_t* sent_hidden(int step, int block) const {
    return sent_state(step, a_.shape.blocks + 1) + int64_t{block} * plan_.rows * (a_.shape.hidden / 2);
  }
  SEDA_KERNEL uint32_t* sent_x(int step) const { return sent_hidden(step, a_.shape.blocks); }

  // What is sent is something: of the bits for "not a number" others are taken.
  SEDA_KERNEL static uint32_t something(uint32_t bits) { return bits == machine::kNothing ? 0x7FFFFFFFu : bits; }

  SEDA_KERNEL void send_state(uint32_t* sent, int column, const Pair& h) const {
    machine::send2(sent + row_ * a_.shape.width + column, something(bits_of(h.first)), something(bits_of(h.second)));
  }
  SEDA_KERNEL void send_two(uint32_t* sent, int column, int columns, const Pair& x) const {
    machine::send(sent + (row_ * columns + column) / 2, something(machine::pack(x.first, x.second)));
  }

  // ---- what a thread keeps for itself, tile by tile: n(c'), the state, x, the total, gates ------------------------

  SEDA_KERNEL int own_state() const { return plan_.width_tiles; }
  SEDA_KERNEL int own_x() const { return 2 * plan_.width_tiles; }
  SEDA_KERNEL int own_total() const { return own_x() + plan_.dim_tiles; }
  SEDA_KERNEL int own_gates(int block) const { return own_total() + plan_.dim_tiles + block * plan_.hidden_tiles; }

  SEDA_KERNEL uint32_t own_place(int tile) const {
    return shared_ + plan_.own + static_cast<uint32_t>(4 * ((tile * kSplitRows + row_) * kSplitColumns + pair_));
  }
  SEDA_KERNEL void keep(int tile, const Pair& value) const {
    machine::store_shared2(own_place(tile), bits_of(value.first), bits_of(value.second));
  }
  SEDA_KERNEL Pair kept(int tile) const {
    uint32_t two[2];
    machine::load_shared2(two, own_place(tile));
    return {float_of(two[0]), float_of(two[1])};
  }

  SEDA_KERNEL static Pair unpack(uint32_t two) { return {float_of(two << 16), float_of(two & 0xFFFF0000u)}; }
  SEDA_KERNEL static Pair load_two(const Bits16* from) {
    return unpack(machine::load(reinterpret_cast<const uint32_t*>(from)));
  }

  const ChainLaunch& a_;
  const SplitPlan& plan_;
  uint32_t shared_;
  int lane_, warp_, rank_, row_, pair_, rows_ = 0;
  int64_t first_row_;
  uint32_t* exchange_ = nullptr;
  uint32_t room_ = 0;
};

}  // namespace seda

// The reverse chain for a few rows, one launch for a whole stage: the columns, not the rows, are spread over all
// processors, so that together they read the weights at the rate of the cache. After each product the blocks of threads
// meet and exchange activations through global memory; gates, the condition's norm and the chain's state stay with the
// thread that made them. Written against machine.h like reverse_chain.h, whose formulas these are.
#pragma once

#include "normals.h"
#include "reverse_chain_launch.h"

namespace seda {

struct alignas(16) Words4 {
  uint32_t at[4];
};

class SplitThread {
 public:
  static constexpr int kThreads = 256, kWarps = kThreads / 32;

  SEDA_KERNEL explicit SplitThread(const ChainLaunch& launch)
      : a_(launch),
        shared_(machine::shared_base()),
        lane_(machine::thread() % 32),
        warp_(machine::thread() / 32),
        stride_(split_stride(launch.shape)) {}

  SEDA_KERNEL void run() {
    const ChainShape& s = a_.shape;
    embed();
    for (int step = 0; step < s.steps; ++step) {
      // h = w_x x + b_x + n(c')
      if (step == 0) read_rows(a_.initial, a_.initial_stride, s.dim);
      else exchange_rows(a_.split.x, s.dim);
      products(a_.weights[kInputWeight], 0, s.width, [&](int row, int column, float sum) {
        const float h = sum + load_bias(a_.b_x + column) + machine::load(own(a_.split.own_condition, column, row));
        machine::exchange_store(state(row, column), h);
      });
      meet();
      for (int block = 0; block < s.blocks; ++block) run_block(step, block);
      norm_rows(nullptr, nullptr);
      update(step);
    }
  }

 private:
  // ---- phases --------------------------------------------------------------------------------------------------

  // c' = w_c c + b_c, its norm, and the gates.
  SEDA_KERNEL void embed() {
    const ChainShape& s = a_.shape;
    read_rows(a_.condition, a_.condition_stride, s.condition_dim);
    products(a_.weights[kConditionWeight], 0, s.width, [&](int row, int column, float sum) {
      machine::exchange_store(state(row, column), sum + load_bias(a_.b_c + column));
    });
    meet();
    norm_rows(nullptr, nullptr);
    // A thread keeps the columns whose sums it makes in the state's products.
    over_own(s.width, [&](int row, int column) {
      const uint32_t place = shared_ + place_of(row, column / 8) + static_cast<uint32_t>(column % 8 / 2 * 4);
      const uint32_t two = machine::load_shared(place);
      machine::store(own(a_.split.own_condition, column, row), float_of(column % 2 ? two & 0xFFFF0000u : two << 16));
    });
    for (int block = 0; block < s.blocks; ++block)
      products(a_.weights[kGateWeight], block * s.hidden, s.hidden, [&](int row, int column, float sum) {
        const float g = 1.0f + sum + load_bias(a_.b_g + block * s.hidden + column);
        machine::store(own(a_.split.own_gates, block * s.hidden + column, row), g);
      });
    // Nobody writes the state while somebody still norms it.
    meet();
  }

  SEDA_KERNEL void run_block(int step, int block) {
    const ChainShape& s = a_.shape;
    const float* modulation = a_.modulation + (int64_t{step} * s.blocks + block) * 3 * s.width;
    norm_rows(modulation, modulation + s.width);
    products(a_.weights[kBlockWeights + 2 * block], 0, s.hidden, [&](int row, int column, float sum) {
      const float gate = machine::load(own(a_.split.own_gates, block * s.hidden + column, row));
      const float u = machine::silu(sum + load_bias(a_.b_h[block] + column)) * gate;
      machine::exchange_store(exchanged(a_.split.hidden, row, column, s.hidden), machine::round_to_bits(u));
    });
    meet();
    exchange_rows(a_.split.hidden, s.hidden);
    products(a_.weights[kBlockWeights + 2 * block + 1], 0, s.width, [&](int row, int column, float sum) {
      const float factor = 1.0f + machine::load(modulation + 2 * s.width + column);
      float* h = state(row, column);
      machine::exchange_store(h, fmaf(factor, sum + load_bias(a_.b_o[block] + column), machine::exchange_load(h)));
    });
    meet();
  }

  // x0_hat = w_y n(h_L) + b_y; result += w x0_hat; x <- a x0_hat + b x + c source + e eps
  SEDA_KERNEL void update(int step) {
    const ChainShape& s = a_.shape;
    const float* k = a_.coefficients + 5 * step;
    const bool last = step + 1 == s.steps;
    products(a_.weights[kOutputWeight], 0, s.dim, [&](int row, int column, float sum) {
      const float estimate = sum + load_bias(a_.b_y + column);
      float* saved = own(a_.split.own_total, column, row);
      const float total = fmaf(machine::load(k + 4), estimate, step == 0 ? 0.0f : machine::load(saved));
      if (last) machine::store(a_.result + int64_t{row} * s.dim + column, machine::round_to_bits(total));
      else machine::store(saved, total);
      if (!last) update_x(step, row, column, estimate);
    });
    if (!last) meet();
  }

  SEDA_KERNEL void update_x(int step, int row, int column, float estimate) {
    const float* k = a_.coefficients + 5 * step;
    const float c = machine::load(k + 2), e = machine::load(k + 3);
    float* saved = own(a_.split.own_x, column, row);
    const float before = step == 0 ? load_bias(a_.initial + row * a_.initial_stride + column) : machine::load(saved);
    float x = fmaf(machine::load(k), estimate, machine::load(k + 1) * before);
    if (c != 0.0f) x = fmaf(c, load_bias(a_.source + row * a_.source_stride + column), x);
    if (a_.noisy && e != 0.0f) {
      const PhiloxRow key(machine::load(a_.seed), machine::load(a_.step) + 1 + step, machine::load(a_.sample_ids + row),
                          a_.stream);
      float even, odd;
      two_normals(key, static_cast<uint32_t>(column & ~1), even, odd);
      x = fmaf(e, column % 2 ? odd : even, x);
    }
    machine::store(saved, x);
    machine::exchange_store(exchanged(a_.split.x, row, column, a_.shape.dim), machine::round_to_bits(x));
  }

  // ---- products ------------------------------------------------------------------------------------------------

  // Calls f(row, column) for the values whose sums this thread makes: 16 rows by 8 columns of a tile, 128 threads.
  template <class Function>
  SEDA_KERNEL void over_own(int outputs, const Function& f) {
    const int row = machine::thread() / kSplitColumns;
    for (int tile = machine::block(); tile < pieces(outputs, kSplitColumns); tile += machine::blocks()) {
      const int column = tile * kSplitColumns + machine::thread() % kSplitColumns;
      if (row < a_.rows && column < outputs) f(row, column);
    }
  }

  // The rows in shared memory times rows first .. first + outputs - 1 of a weight, f(row, column, sum) for each. Warps
  // share the inner dimension. The order of the inner columns inside 32 is that of 16-byte loads, for both operands.
  template <class Function>
  SEDA_KERNEL void products(const WeightMatrix& weight, int first, int outputs, const Function& f) {
    const int group = lane_ / 4, row = machine::thread() / kSplitColumns;
    for (int tile = machine::block(); tile < pieces(outputs, kSplitColumns); tile += machine::blocks()) {
      float sums[4] = {};
      const bool real = tile * kSplitColumns + group < outputs;
      const Bits16* from = weight.data + int64_t{real ? first + tile * kSplitColumns + group : 0} * weight.columns;
#pragma unroll 4
      for (int k = 32 * warp_; k < weight.columns; k += 32 * kWarps) {
        const int column = k + 8 * (lane_ % 4);
        Words4 low{}, high{}, b{};
        if (column < weight.columns) {
          if (real) b = machine::load(reinterpret_cast<const Words4*>(from + column));
          machine::load_shared4(low.at, shared_ + place_of(group, column / 8));
          machine::load_shared4(high.at, shared_ + place_of(group + 8, column / 8));
        }
        machine::multiply_add(sums, {low.at[0], high.at[0], low.at[1], high.at[1]}, b.at[0], b.at[1]);
        machine::multiply_add(sums, {low.at[2], high.at[2], low.at[3], high.at[3]}, b.at[2], b.at[3]);
      }
      for (int v = 0; v < 4; ++v)
        machine::store_shared(partial(warp_, group + v / 2 * 8, 2 * (lane_ % 4) + v % 2), bits_of(sums[v]));
      machine::barrier();
      const int column = tile * kSplitColumns + machine::thread() % kSplitColumns;
      if (row < a_.rows && row < kSplitRows && column < outputs) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w)
          sum += float_of(machine::load_shared(partial(w, row, machine::thread() % kSplitColumns)));
        f(row, column, sum);
      }
      machine::barrier();
    }
  }

  // ---- rows in shared memory -------------------------------------------------------------------------------------

  SEDA_KERNEL uint32_t place_of(int row, int chunk) const { return split_place(stride_, row, chunk); }
  SEDA_KERNEL uint32_t partial(int warp, int row, int column) const {
    const int number = (warp * kSplitRows + row) * kSplitColumns + column;
    return shared_ + kSplitRows * stride_ + static_cast<uint32_t>(4 * number);
  }

  template <class Load>
  SEDA_KERNEL void fill(int columns, const Load& load) {
    for (int i = machine::thread(); i < kSplitRows * (columns / 2); i += kThreads) {
      const int row = i / (columns / 2), pair = i % (columns / 2);
      const uint32_t two = row < a_.rows ? load(row, 2 * pair) : 0u;
      machine::store_shared(shared_ + place_of(row, 0) + static_cast<uint32_t>(4 * pair), two);
    }
    machine::barrier();
  }

  // Rows of a tensor.
  SEDA_KERNEL void read_rows(const Bits16* from, int64_t stride, int columns) {
    fill(columns, [&](int row, int column) {
      return machine::load(reinterpret_cast<const uint32_t*>(from + row * stride + column));
    });
  }

  // Rows that all blocks of threads made together.
  SEDA_KERNEL void exchange_rows(int64_t region, int columns) {
    fill(columns, [&](int row, int column) {
      return machine::exchange_load(reinterpret_cast<uint32_t*>(exchanged(region, row, column, columns)));
    });
  }

  // n(state) * (1 + scale) + shift; the plain norm without them. A warp norms two rows.
  SEDA_KERNEL void norm_rows(const float* shift, const float* scale) {
    constexpr int kPairs = kMostWidth / 64;
    const int width = a_.shape.width;
    for (int row = warp_; row < kSplitRows; row += kWarps) {
      float h[kPairs][2], sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const bool real = 64 * i < width && row < a_.rows;
          h[i][v] = real ? machine::exchange_load(state(row, 64 * i + 2 * lane_ + v)) : 0.0f;
          sum += h[i][v];
        }
      const float mean = over_warp(sum) / static_cast<float>(width);
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int v = 0; v < 2; ++v)
          if (64 * i < width) squares += (h[i][v] - mean) * (h[i][v] - mean);
      const float factor = machine::inverse_root(over_warp(squares) / static_cast<float>(width) + 1e-5f);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (64 * i >= width) break;
        const int column = 64 * i + 2 * lane_;
        float z[2];
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          z[v] = (h[i][v] - mean) * factor;
          if (scale != nullptr) z[v] = fmaf(z[v], 1.0f + machine::load(scale + column + v), machine::load(shift + column + v));
        }
        machine::store_shared(shared_ + place_of(row, 0) + static_cast<uint32_t>(2 * column), machine::pack(z[0], z[1]));
      }
    }
    machine::barrier();
  }

  SEDA_KERNEL static float over_warp(float sum) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += machine::shuffle_xor(sum, mask);
    return sum;
  }

  // ---- memory ----------------------------------------------------------------------------------------------------

  SEDA_KERNEL static float load_bias(const Bits16* from) {
    return float_of(static_cast<uint32_t>(machine::load(from)) << 16);
  }
  // A value that only this thread reads.
  SEDA_KERNEL float* own(int64_t region, int column, int row) const {
    return reinterpret_cast<float*>(a_.scratch + region) + int64_t{column} * kSplitRows + row;
  }
  SEDA_KERNEL float* state(int row, int column) const {
    return reinterpret_cast<float*>(a_.scratch + a_.split.state) + int64_t{row} * a_.shape.width + column;
  }
  SEDA_KERNEL Bits16* exchanged(int64_t region, int row, int column, int columns) const {
    return reinterpret_cast<Bits16*>(a_.scratch + region) + int64_t{row} * columns + column;
  }
  SEDA_KERNEL void meet() { machine::meet_all(reinterpret_cast<uint32_t*>(a_.scratch + a_.split.counter), ++meetings_); }

  const ChainLaunch& a_;
  uint32_t shared_;
  int lane_, warp_;
  uint32_t stride_;
  uint32_t meetings_ = 0;
};

}  // namespace seda

// Sums over rows, by column and by key (timestep, class), in an order that the number of threads does not change.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <span>

#include "arguments.h"

namespace seda {

// Rows that one thread sums before the sums are added up in a fixed order, whatever the number of threads.
constexpr int64_t kChunk = 32;

inline int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

template <class Function>
void parallel_chunks(int64_t rows, int64_t columns, const Function& f) {
  parallel_rows(chunks_of(rows), kChunk * columns, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      f(chunk, chunk * kChunk, std::min(rows, (chunk + 1) * kChunk));
  });
}

inline Tensor zeros(int64_t rows, int64_t columns) {
  Tensor result = empty({rows, columns}, ScalarType::Float);
  return torch::stable::zero_(result);
}

inline float* data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Storage for the sums over rows of one backward part.
struct Sums {
  Tensor bias, columns_sum;
  std::vector<Tensor> tables;
  std::vector<float> heads;
  std::vector<int64_t> order;
  SegmentedSums view{};

  Sums(int64_t rows, int64_t columns) : bias(empty({columns}, ScalarType::Float)),
                                        columns_sum(zeros(chunks_of(rows), columns)) {
    view.columns = columns;
    view.columns_sum = data(columns_sum);
    view.table_stride = columns;
  }

  // Tables of this object's own, with zeros for the keys that no row has.
  void add_tables(const std::vector<int64_t>& keys, int64_t entries, int count) {
    std::array<float*, 2> rows{};
    for (int i = 0; i < count; ++i) {
      tables.push_back(empty({entries, view.columns}, ScalarType::Float));
      rows[static_cast<size_t>(i)] = data(tables.back());
    }
    use_tables(keys, rows, view.columns);
    clear_absent(keys, entries, {rows.data(), static_cast<size_t>(count)}, view.columns, view.columns);
  }

  // Tables elsewhere, whose rows lie ``stride`` apart; null stands for none.
  void use_tables(const std::vector<int64_t>& keys, std::array<float*, 2> rows, int64_t stride) {
    order.resize(keys.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    if (!std::is_sorted(keys.begin(), keys.end()))
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return keys[static_cast<size_t>(a)] < keys[static_cast<size_t>(b)];
      });
    view.order = order.data();
    const int64_t chunks = chunks_of(static_cast<int64_t>(keys.size()));
    // No zeros: the first row of a key overwrites.
    heads.resize(static_cast<size_t>(2 * chunks * view.columns));
    view.table_stride = stride;
    for (size_t i = 0; i < rows.size(); ++i) {
      view.table[i] = rows[i];
      view.head[i] = heads.data() + static_cast<int64_t>(i) * chunks * view.columns;
    }
  }

  // Zeros for the keys that no row has.
  static void clear_absent(const std::vector<int64_t>& keys, int64_t entries, std::span<float* const> tables,
                           int64_t columns, int64_t stride) {
    std::vector<char> present(static_cast<size_t>(entries), 0);
    for (const int64_t key : keys)
      if (key >= 0) present[static_cast<size_t>(key)] = 1;
    parallel_rows(entries, columns, [&](int64_t begin, int64_t end) {
      for (int64_t entry = begin; entry < end; ++entry) {
        if (present[static_cast<size_t>(entry)]) continue;
        for (float* const table : tables) std::fill(table + entry * stride, table + entry * stride + columns, 0.0f);
      }
    });
  }

  // Adds what the chunks left of the keys whose rows span several of them.
  void finish(const std::vector<int64_t>& keys) {
    const int64_t rows = static_cast<int64_t>(order.size());
    for (int64_t begin = kChunk; begin < rows; begin += kChunk) {
      const int64_t key = keys[static_cast<size_t>(order[static_cast<size_t>(begin)])];
      if (key < 0 || keys[static_cast<size_t>(order[static_cast<size_t>(begin - 1)])] != key) continue;
      for (size_t i = 0; i < 2 && view.table[i] != nullptr; ++i)
        for (int64_t j = 0; j < view.columns; ++j)
          view.table[i][key * view.table_stride + j] += view.head[i][begin / kChunk * view.columns + j];
    }
  }

  Tensor sum_columns(int64_t rows) {
    sum_columns(rows, view.columns_sum, data(bias));
    return bias;
  }

  // The chunks' sums, added up in their order.
  void sum_columns(int64_t rows, const float* of_chunks, float* total) const {
    std::fill(total, total + view.columns, 0.0f);
    for (int64_t chunk = 0; chunk < chunks_of(rows); ++chunk)
      for (int64_t j = 0; j < view.columns; ++j) total[j] += of_chunks[chunk * view.columns + j];
  }
};

}  // namespace seda

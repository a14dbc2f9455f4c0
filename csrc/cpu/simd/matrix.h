// Rows of matrices and tables, and the choice of the storage type, for all row kernels.
#pragma once

#include "rows.h"
#include "simd.h"

namespace seda::SEDA_ISA {

template <class T>
SEDA_INLINE const T* row_of(const Matrix& m, int64_t i) {
  return static_cast<const T*>(m.data) + i * m.stride;
}
SEDA_INLINE const float* row_of(const Table& table, int64_t i) { return table.data + i * table.stride; }
// A vector of a row that may be absent, which stands for zeros.
template <class T, class Width>
SEDA_INLINE F load_any(const T* p, int64_t j, Width width) {
  return p == nullptr ? F{} : load(p + j, width);
}
template <class T>
SEDA_INLINE T* new_row_of(const Matrix& m, int64_t i) {
  return static_cast<T*>(m.data) + i * m.stride;
}

// The backward parts run over `order[begin .. end)`, the rows sorted by their key (timestep or class), in chunks. Each chunk owns one row of
// `columns_sum` (the gradient of a bias) and adds to the tables: to the table itself for a key that begins in
// this chunk, to the chunk's row of `head` for one that began in an earlier chunk.
struct TableRow {
  float* data;
  bool fresh;  // nothing was written here yet

  template <class Width>
  inline __attribute__((always_inline)) void add(int64_t j, F x, Width width) const {
    store(data + j, fresh ? x : load(data + j, width) + x, width);
  }
};

SEDA_INLINE TableRow table_row(const SegmentedSums& s, int64_t table, int64_t place, int64_t chunk, int64_t begin,
                               const int64_t* keys) {
  const int64_t key = keys[s.order[place]];
  const bool began_earlier = begin > 0 && keys[s.order[begin - 1]] == key;
  const bool fresh = place == begin || keys[s.order[place - 1]] != key;
  float* const whole = began_earlier ? s.head[table] : s.table[table];
  return {whole + (began_earlier ? chunk * s.columns : key * s.table_stride), fresh};
}

#define SEDA_BY_STORAGE(name, Arguments)                                                                       \
  static void name(const Arguments& a, int64_t begin, int64_t end) {                                           \
    a.storage == Storage::float32 ? name##_rows<float>(a, begin, end) : name##_rows<bfloat16>(a, begin, end);  \
  }
#define SEDA_BACKWARD_BY_STORAGE(name, Arguments)                                                              \
  static void name(const Arguments& a, const SegmentedSums& s, int64_t chunk, int64_t begin, int64_t end) {    \
    a.storage == Storage::float32 ? name##_rows<float>(a, s, chunk, begin, end)                                \
                                  : name##_rows<bfloat16>(a, s, chunk, begin, end);                            \
  }

}  // namespace seda::SEDA_ISA

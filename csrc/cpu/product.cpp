#include "product.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "features.h"

namespace seda {
namespace {

// Fewer rows do not pay for packing the second factor.
constexpr int64_t kLeastRows = 64;

bool turns_to_lines(const Tensor& m) { return m.stride(0) == 1 || m.stride(1) == 1; }

bool checked_own_products() {
  const char* named = std::getenv("SEDA_FAST_CPU_PRODUCTS");
  const auto is = [named](const char* other) { return std::strcmp(named, other) == 0; };
  if (named != nullptr && !is("") && !is("own") && !is("pytorch"))
    refuse("SEDA_FAST_CPU_PRODUCTS=", named, " is neither own nor pytorch");
  return own_products();
}

// Whether our own products take a factor.
bool served(const Tensor& m) {
  static const bool own = checked_own_products();
  return own && m.scalar_type() == ScalarType::Float && m.numel() > 0 && turns_to_lines(m);
}

const float* start(const Tensor& m) { return static_cast<const float*>(m.const_data_ptr()); }

int64_t panels_of(int64_t lines, int64_t together) { return (lines + together - 1) / together; }

Tensor packed(const Tensor& b) {
  const RowKernels& k = kernels();
  const int64_t depth = b.size(0), columns = b.size(1), panels = panels_of(columns, k.tile_columns);
  const Tensor result = empty({panels, depth, k.tile_columns}, ScalarType::Float);
  float* const to = static_cast<float*>(result.mutable_data_ptr());
  const Factor from{start(b), b.stride(1), b.stride(0)};
  parallel_rows(panels, depth * k.tile_columns,
                [&](int64_t begin, int64_t end) { k.pack(from, columns, depth, to, begin, end); });
  return result;
}

float* block_of_thread(int64_t size) {
  thread_local std::vector<float> block;
  if (block.size() < static_cast<size_t>(size)) block.resize(static_cast<size_t>(size));
  return block.data();
}

// Threads share the panels of rows, and where those are few, for each of them parts of the columns.
void multiply_packed(const Tensor& a, const Tensor& packed, int64_t columns, const Tensor& out, Addends addends) {
  const RowKernels& k = kernels();
  const int64_t rows = a.size(0), depth = a.size(1);
  const int64_t row_panels = panels_of(rows, k.tile_rows), column_panels = panels_of(columns, k.tile_columns);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::min(column_panels, panels_of(2 * threads, row_panels));
  const TilesArguments all{{start(a), a.stride(0), a.stride(1)}, start(packed), addends.bias, addends.adds,
                           static_cast<float*>(out.mutable_data_ptr()), out.stride(0), rows, columns, depth, nullptr};
  parallel_rows(parts * row_panels, k.tile_rows * columns * depth / parts, [&](int64_t begin, int64_t end) {
    TilesArguments own = all;
    own.block = block_of_thread(k.block_size);
    while (begin < end) {
      const int64_t part = begin / row_panels, first = begin % row_panels;
      const int64_t last = std::min(row_panels, first + end - begin);
      k.product_tiles(own, first, last, part * column_panels / parts, (part + 1) * column_panels / parts);
      begin += last - first;
    }
  });
}

void call_mm(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the handle that the call returned
}

void multiply_by_vendor(const Tensor& a, const Tensor& b, const Tensor& out, Addends addends) {
  const Tensor product = addends.adds ? empty({out.size(0), out.size(1)}, out.scalar_type()) : out;
  call_mm(a, b, product);
  if (!addends.adds && addends.bias == nullptr) return;
  const AddArguments add{storage_of(out, "out"), new_matrix(out), addends.adds ? new_matrix(product) : Matrix{nullptr, 0},
                         out.size(1), addends.bias, 0.0f};
  parallel_rows(out.size(0), add.columns, [&add](int64_t begin, int64_t end) { kernels().add(add, begin, end); });
}

void check_factor(const Tensor& m, const char* name, int64_t rows) {
  check(m, name, {rows, -1});
  check_dtype(m, name, ScalarType::Float);
  if (!turns_to_lines(m)) refuse(name, " must have contiguous rows or columns");
}

// out (+)= left @ right (+ bias). `always_own`: whatever the CPU and the number of rows.
void matrix_product(const Tensor& left, const Tensor& right, const std::optional<Tensor>& bias, bool adds,
                    bool always_own, Tensor out) {
  check_factor(left, "left", -1);
  if (left.size(1) == 0) refuse("left must have at least one column");
  check_factor(right, "right", left.size(1));
  matrix(out, "out", left.size(0), right.size(1), Storage::float32);
  const Addends addends{bias.has_value() ? floats(*bias, "bias", {right.size(1)}) : nullptr, adds};
  if (out.numel() == 0) return;
  if (always_own)
    multiply_packed(left, packed(right), right.size(1), out, addends);
  else
    multiply_into(left, right, out, addends);
}

}  // namespace

void multiply_into(const Tensor& a, const Tensor& b, const Tensor& out, Addends addends) {
  if (a.size(0) >= kLeastRows && served(a) && served(b) && out.stride(1) == 1)
    multiply_packed(a, packed(b), b.size(1), out, addends);
  else
    multiply_by_vendor(a, b, out, addends);
}

RightFactor::RightFactor(const Tensor& b, int64_t rows) : b_(b) {
  if (rows >= kLeastRows && served(b)) packed_ = packed(b);
}

void RightFactor::multiply(const Tensor& a, const Tensor& out, Addends addends) const {
  if (packed_.defined() && served(a) && out.stride(1) == 1)
    multiply_packed(a, packed_, b_.size(1), out, addends);
  else
    multiply_by_vendor(a, b_, out, addends);
}

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cpp, m) {
  m.def("matrix_product(Tensor left, Tensor right, Tensor? bias, bool adds, bool always_own, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cpp, CompositeExplicitAutograd, m) { m.impl("matrix_product", TORCH_BOX(&matrix_product)); }

}  // namespace seda

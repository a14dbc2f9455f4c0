// Projection: what is done to one block of logits, and the two losses. seda_fast.ops.cpp.projection loops over the
// blocks and multiplies; the rows' arithmetic is in simd/projection.h.
#include <cmath>
#include <optional>
#include <tuple>

#include "sums.h"

namespace seda {
namespace {

LogitsArguments logits_arguments(const Tensor& logits, int64_t first_class, int64_t classes, double temperature) {
  LogitsArguments a{};
  a.storage = storage_of(logits, "logits");
  a.logits = matrix(logits, "logits", -1, -1, a.storage);
  a.columns = logits.size(1);
  if (classes < 0) refuse("classes must not be negative, not ", classes);
  if (first_class < 0 || first_class > classes - a.columns)
    refuse("first_class ", first_class, " and ", a.columns, " columns do not fit ", classes, " classes");
  a.first_class = first_class;
  if (!(temperature > 0.0)) refuse("temperature must be positive, not ", temperature);
  a.scale = static_cast<float>(1.0 / temperature);
  return a;
}

void logits_block(const Tensor& logits, const Tensor& labels, int64_t first_class, int64_t classes, double temperature,
                  int64_t ignore_index, Tensor state) {
  LogitsArguments a = logits_arguments(logits, first_class, classes, temperature);
  const int64_t rows = logits.size(0);
  const std::vector<int64_t> known = indices(labels, "labels", rows, classes, &ignore_index);
  a.labels = known.data();
  floats(state, "state", {rows, 4});
  a.state = data(state);
  parallel_rows(rows, 4 * a.columns, [&](int64_t begin, int64_t end) { kernels().logits(a, begin, end); });
}

Tensor logits_block_backward(Tensor logits, const Tensor& labels, int64_t first_class, int64_t classes,
                             double temperature, int64_t ignore_index, const Tensor& log_normaliser, double grad,
                             double label_smoothing) {
  LogitsArguments a = logits_arguments(logits, first_class, classes, temperature);
  if (!logits.is_contiguous()) refuse("logits must be contiguous");
  a.logits = new_matrix(logits);
  const int64_t rows = logits.size(0);
  const std::vector<int64_t> known = indices(labels, "labels", rows, classes, &ignore_index);
  a.labels = known.data();
  a.log_normaliser = floats(log_normaliser, "log_normaliser", {rows});
  a.grad = static_cast<float>(grad);
  a.smoothing = static_cast<float>(label_smoothing / static_cast<double>(classes));
  a.certainty = static_cast<float>(1.0 - label_smoothing);
  Sums sums(rows, a.columns);
  parallel_chunks(rows, 4 * a.columns, [&](int64_t chunk, int64_t begin, int64_t end) {
    kernels().logits_backward(a, sums.view, chunk, begin, end);
  });
  return sums.sum_columns(rows);
}

CentreArguments centre_arguments(const Tensor& features, const Tensor& centres, const std::vector<int64_t>& labels) {
  CentreArguments a{};
  a.storage = storage_of(features, "features");
  a.features = matrix(features, "features", -1, -1, a.storage);
  a.columns = features.size(1);
  a.centres = matrix(centres, "centres", -1, a.columns, a.storage);
  a.labels = labels.data();
  return a;
}

// The losses are summed by one thread in float64: their value does not depend on the number of threads.
std::tuple<Tensor, Tensor, Tensor> projection_losses(const Tensor& state, const Tensor& features,
                                                     const Tensor& labels, const std::optional<Tensor>& centres,
                                                     int64_t classes, double label_smoothing, int64_t ignore_index) {
  if (classes < 0) refuse("classes must not be negative, not ", classes);
  check(features, "features", {-1, -1});
  const int64_t rows = features.size(0);
  const std::vector<int64_t> known = indices(labels, "labels", rows, classes, &ignore_index);
  const float* s = floats(state, "state", {rows, 4});
  Tensor log_normaliser = empty({rows}, ScalarType::Float), centre_loss = empty({}, ScalarType::Float), cross_entropy = empty({}, ScalarType::Float);
  double entropy = 0.0, distance = 0.0;
  int64_t labelled = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double log_sum = static_cast<double>(s[4 * i]) + std::log(static_cast<double>(s[4 * i + 1]));
    data(log_normaliser)[i] = static_cast<float>(log_sum);
    if (known[static_cast<size_t>(i)] < 0) continue;
    ++labelled;
    entropy += log_sum - (1.0 - label_smoothing) * s[4 * i + 2];
    // 0 times the minus infinity of a class that a bias leaves out is no number.
    if (label_smoothing > 0) entropy -= label_smoothing * s[4 * i + 3] / classes;
  }
  if (centres.has_value()) {
    CentreArguments a = centre_arguments(features, *centres, known);
    if (centres->size(0) != classes) refuse("centres must have ", classes, " rows, not ", centres->size(0));
    std::vector<float> distances(static_cast<size_t>(rows));
    a.distance = distances.data();
    parallel_rows(rows, a.columns, [&](int64_t begin, int64_t end) { kernels().centre(a, begin, end); });
    for (const float d : distances) distance += d;
  }
  const double count = static_cast<double>(std::max<int64_t>(labelled, 1));
  *data(centre_loss) =
      static_cast<float>(distance / (count * static_cast<double>(std::max<int64_t>(features.size(1), 1))));
  *data(cross_entropy) = static_cast<float>(entropy / count);
  return {centre_loss, cross_entropy, log_normaliser};
}

Tensor centre_backward(const Tensor& features, const Tensor& centres, const Tensor& labels, int64_t ignore_index,
                       double scale, bool centre_gradient, Tensor grad_features) {
  check(centres, "centres", {-1, -1});
  check(features, "features", {-1, -1});
  const int64_t rows = features.size(0), classes = centres.size(0);
  const std::vector<int64_t> known = indices(labels, "labels", rows, classes, &ignore_index);
  CentreArguments a = centre_arguments(features, centres, known);
  floats(grad_features, "grad_features", {rows, a.columns});
  a.grad = new_matrix(grad_features);
  a.scale = static_cast<float>(scale);
  Sums sums(0, a.columns);
  sums.add_tables(known, classes, centre_gradient ? 1 : 0);
  parallel_chunks(rows, a.columns, [&](int64_t chunk, int64_t begin, int64_t end) {
    kernels().centre_backward(a, sums.view, chunk, begin, end);
  });
  if (!centre_gradient) return empty({0}, ScalarType::Float);
  sums.finish(known);
  return sums.tables[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cpp, m) {
  // state (rows, 4) starts as (-inf, 0, 0, 0): running maximum, sum of exp(logit - maximum), true logit, sum of logits.
  m.def(
      "logits_block(Tensor logits, Tensor labels, int first_class, int classes, float temperature, int ignore_index, "
      "Tensor(a!) state) -> ()");
  // logits becomes the gradient of the products; returned is its sum over the rows, the bias's gradient.
  m.def(
      "logits_block_backward(Tensor(a!) logits, Tensor labels, int first_class, int classes, float temperature, "
      "int ignore_index, Tensor log_normaliser, float grad, float label_smoothing) -> Tensor");
  m.def(
      "projection_losses(Tensor state, Tensor features, Tensor labels, Tensor? centres, int classes, "
      "float label_smoothing, int ignore_index) -> (Tensor centre_loss, Tensor cross_entropy, Tensor log_normaliser)");
  m.def(
      "centre_backward(Tensor features, Tensor centres, Tensor labels, int ignore_index, float scale, "
      "bool centre_gradient, Tensor(a!) grad_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("logits_block", TORCH_BOX(&logits_block));
  m.impl("logits_block_backward", TORCH_BOX(&logits_block_backward));
  m.impl("projection_losses", TORCH_BOX(&projection_losses));
  m.impl("centre_backward", TORCH_BOX(&centre_backward));
}

}  // namespace seda

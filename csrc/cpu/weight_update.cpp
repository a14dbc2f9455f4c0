// The optimiser's step: argument checks and threads; the arithmetic is in simd/weight_update.h. All tensors of a list
// are walked through as one row of pieces of a fixed length, so that a thread's share does not depend on where one ends.
#include <cmath>

#include "arguments.h"

namespace seda {
namespace {

using TensorList = std::vector<Tensor>;

// Elements that are summed by themselves, whatever the number of threads.
constexpr int64_t kPiece = 8192;

struct Piece {
  size_t tensor;
  int64_t begin, end;
};

std::string element(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

void check_vector(const Tensor& tensor, const std::string& name, const Tensor* like) {
  if (!tensor.defined()) refuse(name, " is undefined");
  if (!tensor.is_cpu()) refuse(name, " must be on the CPU");
  if (!is_strided(tensor)) refuse(name, " must be a strided tensor");
  check_dtype(tensor, name, ScalarType::Float);
  check_contiguous(tensor, name);
  if (like != nullptr && tensor.numel() != like->numel())
    refuse(name, " must have ", like->numel(), " elements, not ", tensor.numel());
  check_start(tensor, name);
}

void check_list(const TensorList& list, const char* name, const TensorList* like) {
  if (list.empty()) refuse(name, " must hold at least one tensor");
  if (like != nullptr && list.size() != like->size())
    refuse(name, " must hold ", like->size(), " tensors, not ", list.size());
  for (size_t i = 0; i < list.size(); ++i) check_vector(list[i], element(name, i), like ? &(*like)[i] : nullptr);
}

std::vector<Piece> pieces_of(const TensorList& list) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < list.size(); ++i)
    for (int64_t begin = 0, size = list[i].numel(); begin < size; begin += kPiece)
      pieces.push_back({i, begin, begin + kPiece < size ? begin + kPiece : size});
  return pieces;
}

template <class Function>
void parallel_pieces(const std::vector<Piece>& pieces, const Function& f) {
  parallel_rows(static_cast<int64_t>(pieces.size()), kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(static_cast<size_t>(i), pieces[static_cast<size_t>(i)]);
  });
}

std::vector<float*> pointers(const TensorList& list) {
  std::vector<float*> found;
  for (const Tensor& tensor : list) found.push_back(static_cast<float*>(tensor.mutable_data_ptr()));
  return found;
}

Tensor gradient_norm(TensorList grads) {
  check_list(grads, "grads", nullptr);
  const std::vector<Piece> pieces = pieces_of(grads);
  std::vector<double> sums(pieces.size());
  std::vector<const float*> data;
  for (const Tensor& grad : grads) data.push_back(static_cast<const float*>(grad.const_data_ptr()));
  parallel_pieces(pieces, [&](size_t i, const Piece& piece) {
    sums[i] = kernels().squares(data[piece.tensor] + piece.begin, piece.end - piece.begin);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  Tensor norm = empty({}, ScalarType::Float);
  *static_cast<float*>(norm.mutable_data_ptr()) = static_cast<float>(std::sqrt(total));
  return norm;
}

// What the tensors' own numbers of steps make of the numbers that all share; counts the step.
UpdateArguments at_step(UpdateArguments a, const Tensor& steps, double learning_rate, double beta1, double beta2) {
  float* const step = static_cast<float*>(steps.mutable_data_ptr());
  *step += 1.0f;
  const double n = static_cast<double>(*step);
  a.step_size = static_cast<float>(learning_rate / (1.0 - std::pow(beta1, n)));
  a.square_scale = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, n)));
  return a;
}

void weight_update(TensorList weights, TensorList grads, TensorList exp_avg, TensorList exp_avg_sq, TensorList average,
                   TensorList steps, const Tensor& norm, double clip_norm, double learning_rate, double beta1,
                   double beta2, double epsilon, double weight_decay, double moved) {
  check_list(weights, "weights", nullptr);
  check_list(grads, "grads", &weights);
  check_list(exp_avg, "exp_avg", &weights), check_list(exp_avg_sq, "exp_avg_sq", &weights);
  check_list(average, "average", &weights);
  if (steps.size() != weights.size()) refuse("steps must hold ", weights.size(), " tensors, not ", steps.size());
  for (size_t i = 0; i < steps.size(); ++i) floats(steps[i], element("steps", i).c_str(), {});
  const float total = *floats(norm, "norm", {});
  kernels();  // may refuse, and then no step was counted

  UpdateArguments shared{};
  // Not std::min: a norm that is not a number must reach the weights, as it does in PyTorch.
  const float clip = static_cast<float>(clip_norm) / (total + 1e-6f);
  shared.clip = clip > 1.0f ? 1.0f : clip;
  shared.decay = static_cast<float>(1.0 - learning_rate * weight_decay);
  shared.new_average = static_cast<float>(1.0 - beta1);
  shared.old_square = static_cast<float>(beta2), shared.new_square = static_cast<float>(1.0 - beta2);
  shared.epsilon = static_cast<float>(epsilon), shared.moved = static_cast<float>(moved);
  const std::vector<float*> to = pointers(weights), first = pointers(exp_avg), second = pointers(exp_avg_sq);
  const std::vector<float*> mean = pointers(average);
  std::vector<UpdateArguments> each;
  for (size_t i = 0; i < weights.size(); ++i) {
    UpdateArguments a = at_step(shared, steps[i], learning_rate, beta1, beta2);
    a.grad = static_cast<const float*>(grads[i].const_data_ptr());
    a.weight = to[i], a.exp_avg = first[i], a.exp_avg_sq = second[i], a.average = mean[i];
    each.push_back(a);
  }
  parallel_pieces(pieces_of(weights), [&](size_t, const Piece& piece) {
    kernels().weight_update(each[piece.tensor], piece.begin, piece.end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cpp, m) {
  m.def("gradient_norm(Tensor[] grads) -> Tensor");
  m.def(
      "weight_update(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor(d!)[] average, Tensor(e!)[] steps, Tensor norm, float clip_norm, float learning_rate, float beta1, "
      "float beta2, float epsilon, float weight_decay, float moved) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("gradient_norm", TORCH_BOX(&gradient_norm));
  m.impl("weight_update", TORCH_BOX(&weight_update));
}

}  // namespace seda

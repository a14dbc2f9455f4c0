// A whole PFIN in training, forward and backward: argument checks, the order of the parts, and memory. The rows'
// arithmetic is in simd/interaction.h, the products are product.h's. Formulas: reference.interaction_network_forward
// and _backward. Gates and gradients of tables are read and written where they lie in the whole, without copies.
#include <cmath>
#include <span>

#include "product.h"
#include "sums.h"

namespace seda {
namespace {

using TensorList = std::vector<Tensor>;
using Pointers = std::vector<const float*>;

std::string element(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

Tensor part_of(const Tensor& whole, int64_t dimension, int64_t begin, int64_t count) {
  Tensor from = whole;
  return torch::stable::narrow(from, static_cast<int32_t>(dimension), begin, count);
}

// What forward and backward have in common: sizes, operands, dropout, and what the forward leaves.
class Network {
 public:
  Network(const Tensor& x, const TensorList& conditions, const Tensor& timesteps, const Tensor& modulation,
          const Tensor& w_x, const Tensor& w_c, const Tensor& w_g, const Tensor& b_g, const TensorList& w_h,
          const TensorList& b_h, const TensorList& w_o, const TensorList& b_o, const Tensor& w_y)
      : x(x), conditions(conditions), w_x(w_x), w_c(w_c), w_g(w_g), w_y(w_y), w_h(w_h), w_o(w_o) {
    storage = storage_of(x, "x"), dtype = x.scalar_type();
    matrix(x, "x", -1, -1, storage);
    rows = x.size(0), dim = x.size(1);
    matrix(w_x, "w_x", -1, dim, storage);
    width = w_x.size(0);
    check_blocks(b_h, b_o);
    check_conditions();
    matrix(w_g, "w_g", blocks * hidden, width, storage), matrix(w_y, "w_y", dim, width, storage);
    check(modulation, "modulation", {-1, blocks, 3, width});
    steps = modulation.size(0);
    modulation_ = floats(modulation, "modulation", {-1, blocks, 3, width});
    tau = indices(timesteps, "timesteps", rows, steps);
    const float* bias = floats(b_g, "b_g", {blocks * hidden});
    // The gates are 1 + product + bias.
    gate_bias.assign(bias, bias + blocks * hidden);
    for (float& value : gate_bias) value += 1.0f;
  }

  void set_dropout(double dropout, const Tensor& seed, const Tensor& step, const Tensor& sample_ids, int64_t stream) {
    if (!(dropout >= 0.0 && dropout < 1.0)) refuse("dropout must be in [0, 1), not ", dropout);
    dropout_.threshold = static_cast<int32_t>(std::ceil(dropout * 0x1p24 - 0.5));
    dropout_.kept = static_cast<float>(1.0 / (1.0 - dropout));
    dropout_.seed = counter(seed, "seed"), dropout_.step = counter(step, "step");
    dropout_.sample_ids = integers(sample_ids, "sample_ids", rows);
    dropout_.stream = check_stream(stream);
    check_stream(stream + blocks - 1);
  }

  // condition (B, d) with its bias, normed (B, d), gates (B, L m d), pre and hidden (L B, m d), residuals (L B, d) as
  // bare products, states and modulated ((L + 1) B, d).
  void keep(const TensorList& saved) {
    const int64_t sizes[][2] = {{rows, width},           {rows, width},           {rows, blocks * hidden},
                                {blocks * rows, hidden}, {blocks * rows, hidden}, {blocks * rows, width},
                                {(blocks + 1) * rows, width}, {(blocks + 1) * rows, width}};
    if (saved.size() != std::size(sizes)) refuse("saved must hold ", std::size(sizes), " tensors, not ", saved.size());
    for (size_t i = 0; i < saved.size(); ++i) own(saved[i], element("saved", i), sizes[i][0], sizes[i][1]);
    condition = saved[0], normed = saved[1], gates = saved[2], pre = saved[3], hiddens = saved[4];
    residuals = saved[5], states = saved[6], modulated = saved[7];
  }

  // A contiguous matrix of the network's storage.
  void own(const Tensor& tensor, const std::string& name, int64_t count, int64_t columns) const {
    matrix(tensor, name.c_str(), count, columns, storage);
    if (!tensor.is_contiguous()) refuse(name, " must be contiguous");
  }

  Tensor matrix_of(int64_t columns) const { return empty({rows, columns}, dtype); }
  // Block i of tensors that hold the blocks' rows one after the other.
  Tensor of_block(const Tensor& whole, int64_t i) const { return part_of(whole, 0, i * rows, rows); }
  // Columns of block i in a matrix of all gates.
  Matrix gates_of(const Tensor& whole, int64_t i) const {
    const int64_t size = storage == Storage::float32 ? 4 : 2;
    return {static_cast<char*>(whole.mutable_data_ptr()) + i * hidden * size, whole.stride(0)};
  }
  // Table number `which` (shift, scale, alpha) of block i.
  Table table_of(int64_t i, int64_t which) const { return {modulation_ + (3 * i + which) * width, table_stride()}; }
  int64_t table_stride() const { return 3 * blocks * width; }

  SiluArguments silu(int64_t i) const {
    SiluArguments a = dropout_;
    a.storage = storage, a.columns = hidden;
    a.stream += i;
    a.bias = b_h[static_cast<size_t>(i)], a.gate_bias = gate_bias.data() + i * hidden;
    a.pre = new_matrix(of_block(pre, i)), a.gate = gates_of(gates, i);
    return a;
  }

  Storage storage;
  ScalarType dtype;
  int64_t rows, dim, width, hidden, blocks, steps;
  Tensor x;
  TensorList conditions;
  Tensor w_x, w_c, w_g, w_y;
  TensorList w_h, w_o;
  Pointers b_h, b_o;
  std::vector<int64_t> tau;
  std::vector<float> gate_bias;
  Tensor condition, normed, gates, pre, hiddens, residuals, states, modulated;

 private:
  void check_blocks(const TensorList& biases_h, const TensorList& biases_o) {
    const size_t count = w_h.size();
    if (count == 0 || biases_h.size() != count || w_o.size() != count || biases_o.size() != count)
      refuse("w_h, b_h, w_o and b_o must hold one tensor for each block, and at least one");
    check(w_h[0], "w_h[0]", {-1, width});
    blocks = static_cast<int64_t>(count), hidden = w_h[0].size(0);
    for (size_t i = 0; i < count; ++i) {
      matrix(w_h[i], element("w_h", i).c_str(), hidden, width, storage);
      matrix(w_o[i], element("w_o", i).c_str(), width, hidden, storage);
      b_h.push_back(floats(biases_h[i], element("b_h", i).c_str(), {hidden}));
      b_o.push_back(floats(biases_o[i], element("b_o", i).c_str(), {width}));
    }
  }

  void check_conditions() {
    if (conditions.empty()) refuse("conditions must hold at least one tensor");
    int64_t columns = 0;
    for (size_t i = 0; i < conditions.size(); ++i) {
      matrix(conditions[i], element("conditions", i).c_str(), rows, -1, storage);
      columns += conditions[i].size(1);
    }
    matrix(w_c, "w_c", width, columns, storage);
  }

  const float* modulation_;
  SiluArguments dropout_{};
};

// condition = sum over the parts of part @ w_c[:, its columns].T + bias, normed = n(condition).
void embed_condition(const Network& net, const float* bias) {
  int64_t column = 0;
  for (size_t i = 0; i < net.conditions.size(); ++i) {
    const int64_t columns = net.conditions[i].size(1);
    const Addends addends{i == 0 ? bias : nullptr, i > 0};
    multiply_into(net.conditions[i], turned(part_of(net.w_c, 1, column, columns)), net.condition, addends);
    column += columns;
  }
  const PlainNormArguments a{net.storage, new_matrix(net.condition), new_matrix(net.normed), net.width};
  parallel_rows(net.rows, net.width, [&a](int64_t begin, int64_t end) { kernels().plain_norm(a, begin, end); });
}

// State i from the one before it (the embedded condition for i = 0), and its modulated norm; the last one's is plain.
void next_state(const Network& net, int64_t i, const Tensor& before, const Tensor& residual, const float* bias) {
  ResidualNormArguments a{};
  a.storage = net.storage, a.columns = net.width, a.bias = bias, a.timesteps = net.tau.data();
  a.h = new_matrix(before), a.residual = new_matrix(residual);
  a.h_next = new_matrix(net.of_block(net.states, i)), a.z = new_matrix(net.of_block(net.modulated, i));
  if (i > 0) a.alpha = net.table_of(i - 1, 2);
  if (i < net.blocks) a.shift = net.table_of(i, 0), a.scale = net.table_of(i, 1);
  parallel_rows(net.rows, 2 * net.width, [&a](int64_t begin, int64_t end) { kernels().residual_norm(a, begin, end); });
}

void interaction_network(const Tensor& x, TensorList conditions, const Tensor& timesteps, const Tensor& modulation,
                         const Tensor& w_x, const Tensor& b_x, const Tensor& w_c, const Tensor& b_c, const Tensor& w_g,
                         const Tensor& b_g, TensorList w_h, TensorList b_h, TensorList w_o, TensorList b_o,
                         const Tensor& w_y, const Tensor& b_y, double dropout, const Tensor& seed, const Tensor& step,
                         const Tensor& sample_ids, int64_t stream, TensorList saved, Tensor prediction) {
  Network net(x, conditions, timesteps, modulation, w_x, w_c, w_g, b_g, w_h, b_h, w_o, b_o, w_y);
  net.set_dropout(dropout, seed, step, sample_ids, stream);
  net.keep(saved);
  const float *input_bias = floats(b_x, "b_x", {net.width}), *condition_bias = floats(b_c, "b_c", {net.width});
  const float* output_bias = floats(b_y, "b_y", {net.dim});
  net.own(prediction, "prediction", net.rows, net.dim);

  embed_condition(net, condition_bias);
  multiply_into(net.normed, turned(net.w_g), net.gates);
  const Tensor input = net.matrix_of(net.width);
  multiply_into(net.x, turned(net.w_x), input);
  next_state(net, 0, net.normed, input, input_bias);
  for (int64_t i = 0; i < net.blocks; ++i) {
    const size_t n = static_cast<size_t>(i);
    const Tensor pre = net.of_block(net.pre, i), hidden = net.of_block(net.hiddens, i);
    multiply_into(net.of_block(net.modulated, i), turned(net.w_h[n]), pre);
    SiluArguments a = net.silu(i);
    a.hidden = new_matrix(hidden);
    parallel_rows(net.rows, 4 * net.hidden, [&a](int64_t begin, int64_t end) { kernels().gated_silu(a, begin, end); });
    const Tensor residual = net.of_block(net.residuals, i);
    multiply_into(hidden, turned(net.w_o[n]), residual);
    next_state(net, i + 1, net.of_block(net.states, i), residual, net.b_o[n]);
  }
  multiply_into(net.of_block(net.modulated, net.blocks), turned(net.w_y), prediction, {output_bias});
}

// The gradients' places, in the order of the operator's list.
class Gradients {
 public:
  Gradients(const Network& net, const TensorList& grads) : grads_(grads), blocks_(static_cast<size_t>(net.blocks)) {
    const size_t count = kSingle + 4 * blocks_ + net.conditions.size();
    if (grads.size() != count) refuse("grads must hold ", count, " tensors, not ", grads.size());
    const auto wide = [&](size_t i) { return element("grads", i); };
    if (wanted(0)) net.own(grads[0], wide(0), net.rows, net.dim);
    floats(grads[1], wide(1).c_str(), {net.steps, net.blocks, 3, net.width});
    net.own(grads[2], wide(2), net.width, net.dim), floats(grads[3], wide(3).c_str(), {net.width});
    net.own(grads[4], wide(4), net.width, net.w_c.size(1)), floats(grads[5], wide(5).c_str(), {net.width});
    net.own(grads[6], wide(6), net.blocks * net.hidden, net.width);
    floats(grads[7], wide(7).c_str(), {net.blocks * net.hidden});
    net.own(grads[8], wide(8), net.dim, net.width), floats(grads[9], wide(9).c_str(), {net.dim});
    for (size_t i = 0; i < blocks_; ++i) {
      net.own(w_h(i), wide(kSingle + i), net.hidden, net.width);
      floats(b_h(i), wide(kSingle + blocks_ + i).c_str(), {net.hidden});
      net.own(w_o(i), wide(kSingle + 2 * blocks_ + i), net.width, net.hidden);
      floats(b_o(i), wide(kSingle + 3 * blocks_ + i).c_str(), {net.width});
    }
    for (size_t i = 0; i < net.conditions.size(); ++i)
      if (wanted(kSingle + 4 * blocks_ + i)) net.own(condition(i), wide(kSingle + 4 * blocks_ + i), net.rows, net.conditions[i].size(1));
  }

  // An empty vector stands for a gradient that nobody asks for: of x, or of a condition.
  bool wants_x() const { return wanted(0); }
  bool wants_condition(size_t i) const { return wanted(kSingle + 4 * blocks_ + i); }

  const Tensor& x() const { return grads_[0]; }
  const Tensor& modulation() const { return grads_[1]; }
  const Tensor& w_x() const { return grads_[2]; }
  const Tensor& b_x() const { return grads_[3]; }
  const Tensor& w_c() const { return grads_[4]; }
  const Tensor& b_c() const { return grads_[5]; }
  const Tensor& w_g() const { return grads_[6]; }
  const Tensor& b_g() const { return grads_[7]; }
  const Tensor& w_y() const { return grads_[8]; }
  const Tensor& b_y() const { return grads_[9]; }
  const Tensor& w_h(size_t i) const { return grads_[kSingle + i]; }
  const Tensor& b_h(size_t i) const { return grads_[kSingle + blocks_ + i]; }
  const Tensor& w_o(size_t i) const { return grads_[kSingle + 2 * blocks_ + i]; }
  const Tensor& b_o(size_t i) const { return grads_[kSingle + 3 * blocks_ + i]; }
  const Tensor& condition(size_t i) const { return grads_[kSingle + 4 * blocks_ + i]; }

 private:
  static constexpr size_t kSingle = 10;

  bool wanted(size_t i) const { return !grads_[i].defined() || grads_[i].dim() != 1; }

  TensorList grads_;
  size_t blocks_;
};

// The backward pass, from the gradient of the prediction down to those of the inputs.
class Backward {
 public:
  Backward(const Network& net, const Gradients& grads)
      : net_(net),
        grads_(grads),
        grad_h_(net.matrix_of(net.width)),
        narrow_(net.matrix_of(net.width)),
        wide_(net.matrix_of(net.hidden)),
        grad_gates_(net.matrix_of(net.blocks * net.hidden)) {
    float* const table = data(grads.modulation());
    Sums::clear_absent(net.tau, net.steps, {&table, 1}, net.table_stride(), net.table_stride());
  }

  void run(const Tensor& grad) {
    const Tensor last = net_.of_block(net_.modulated, net_.blocks);
    multiply_into(turned(grad), last, grads_.w_y());
    sum_columns(grad, grads_.b_y());
    multiply_into(grad, net_.w_y, narrow_);
    norm(net_.of_block(net_.states, net_.blocks), narrow_, grad_h_, nullptr);
    for (int64_t i = net_.blocks - 1; i >= 0; --i) block(i);
    multiply_into(turned(grad_h_), net_.x, grads_.w_x());
    if (grads_.wants_x()) multiply_into(grad_h_, net_.w_x, grads_.x());
    conditions();
  }

 private:
  float* table(int64_t i, int64_t which) const { return data(grads_.modulation()) + (3 * i + which) * net_.width; }

  void sum_columns(const Tensor& m, const Tensor& total) const {
    Sums sums(net_.rows, m.size(1));
    const AddArguments a{net_.storage, new_matrix(m), {nullptr, 0}, m.size(1), nullptr, 0.0f};
    parallel_chunks(net_.rows, a.columns, [&](int64_t chunk, int64_t begin, int64_t end) {
      kernels().column_sums(a, sums.view, chunk, begin, end);
    });
    sums.sum_columns(net_.rows, sums.view.columns_sum, data(total));
  }

  // result = the gradient of h from that of n(h), its sum over the rows to `sum` unless that is null.
  void norm(const Tensor& h, const Tensor& grad, const Tensor& result, const Tensor* sum) const {
    NormArguments a{};
    a.storage = net_.storage, a.columns = net_.width, a.sums_result = sum != nullptr;
    a.h = new_matrix(h), a.z = new_matrix(grad), a.grad_h = new_matrix(result);
    Sums sums(net_.rows, net_.width);
    run_norm(a, sums, sum);
  }

  void run_norm(const NormArguments& a, Sums& sums, const Tensor* sum) const {
    parallel_chunks(net_.rows, 2 * net_.width, [&](int64_t chunk, int64_t begin, int64_t end) {
      kernels().modulated_norm_backward(a, sums.view, chunk, begin, end);
    });
    if (sum != nullptr) sums.sum_columns(net_.rows, sums.view.columns_sum, data(*sum));
  }

  void block(int64_t i) {
    const size_t n = static_cast<size_t>(i);
    residual(i);
    multiply_into(turned(narrow_), net_.of_block(net_.hiddens, i), grads_.w_o(n));
    multiply_into(narrow_, net_.w_o[n], wide_);
    silu(i);
    multiply_into(turned(wide_), net_.of_block(net_.modulated, i), grads_.w_h(n));
    multiply_into(wide_, net_.w_h[n], narrow_);
    NormArguments a{};
    a.storage = net_.storage, a.columns = net_.width, a.timesteps = net_.tau.data();
    a.h = new_matrix(net_.of_block(net_.states, i)), a.z = new_matrix(narrow_);
    a.grad = a.grad_h = new_matrix(grad_h_);
    a.scale = net_.table_of(i, 1);
    a.sums_result = i == 0;
    Sums sums(net_.rows, net_.width);
    sums.use_tables(net_.tau, {table(i, 0), table(i, 1)}, net_.table_stride());
    run_norm(a, sums, i == 0 ? &grads_.b_x() : nullptr);
    sums.finish(net_.tau);
  }

  // narrow = gradient of the block's second product.
  void residual(int64_t i) {
    ResidualArguments a{};
    a.storage = net_.storage, a.columns = net_.width, a.bias = net_.b_o[static_cast<size_t>(i)];
    a.timesteps = net_.tau.data(), a.alpha = net_.table_of(i, 2);
    a.h = new_matrix(grad_h_), a.residual = new_matrix(net_.of_block(net_.residuals, i));
    a.result = new_matrix(narrow_);
    Sums sums(net_.rows, net_.width);
    sums.use_tables(net_.tau, {table(i, 2), nullptr}, net_.table_stride());
    parallel_chunks(net_.rows, net_.width, [&](int64_t chunk, int64_t begin, int64_t end) {
      kernels().gated_residual_backward(a, sums.view, chunk, begin, end);
    });
    sums.finish(net_.tau);
    sums.sum_columns(net_.rows, sums.view.columns_sum, data(grads_.b_o(static_cast<size_t>(i))));
  }

  // wide: from the gradient of the gated activation to that of the first product.
  void silu(int64_t i) {
    SiluArguments a = net_.silu(i);
    a.hidden = new_matrix(wide_), a.grad_gate = net_.gates_of(grad_gates_, i);
    Sums sums(net_.rows, net_.hidden);
    const Tensor of_gates = zeros(chunks_of(net_.rows), net_.hidden);
    sums.view.gates_sum = data(of_gates);
    parallel_chunks(net_.rows, 4 * net_.hidden, [&](int64_t chunk, int64_t begin, int64_t end) {
      kernels().gated_silu_backward(a, sums.view, chunk, begin, end);
    });
    sums.sum_columns(net_.rows, sums.view.columns_sum, data(grads_.b_h(static_cast<size_t>(i))));
    sums.sum_columns(net_.rows, sums.view.gates_sum, data(grads_.b_g()) + i * net_.hidden);
  }

  // n(c') goes into the gates and into the first state, whose gradient grad_h is by now.
  void conditions() {
    multiply_into(turned(grad_gates_), net_.normed, grads_.w_g());
    multiply_into(grad_gates_, net_.w_g, grad_h_, {nullptr, true});
    norm(net_.condition, grad_h_, grad_h_, &grads_.b_c());
    int64_t column = 0;
    for (size_t i = 0; i < net_.conditions.size(); ++i) {
      const int64_t columns = net_.conditions[i].size(1);
      multiply_into(turned(grad_h_), net_.conditions[i], part_of(grads_.w_c(), 1, column, columns));
      if (grads_.wants_condition(i))
        multiply_into(grad_h_, part_of(net_.w_c, 1, column, columns), grads_.condition(i));
      column += columns;
    }
  }

  const Network& net_;
  const Gradients& grads_;
  Tensor grad_h_, narrow_, wide_, grad_gates_;
};

void interaction_network_backward(const Tensor& grad, const Tensor& x, TensorList conditions, const Tensor& timesteps,
                                  const Tensor& modulation, const Tensor& w_x, const Tensor& w_c, const Tensor& w_g,
                                  const Tensor& b_g, TensorList w_h, TensorList b_h, TensorList w_o, TensorList b_o,
                                  const Tensor& w_y, double dropout, const Tensor& seed, const Tensor& step,
                                  const Tensor& sample_ids, int64_t stream, TensorList saved, TensorList grads) {
  Network net(x, conditions, timesteps, modulation, w_x, w_c, w_g, b_g, w_h, b_h, w_o, b_o, w_y);
  net.set_dropout(dropout, seed, step, sample_ids, stream);
  net.keep(saved);
  matrix(grad, "grad", net.rows, net.dim, net.storage);
  const Gradients checked(net, grads);
  Backward(net, checked).run(grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cpp, m) {
  m.def(
      "interaction_network(Tensor x, Tensor[] conditions, Tensor timesteps, Tensor modulation, Tensor w_x, Tensor b_x, "
      "Tensor w_c, Tensor b_c, Tensor w_g, Tensor b_g, Tensor[] w_h, Tensor[] b_h, Tensor[] w_o, Tensor[] b_o, "
      "Tensor w_y, Tensor b_y, float dropout, Tensor seed, Tensor step, Tensor sample_ids, int stream, "
      "Tensor(a!)[] saved, Tensor(b!) prediction) -> ()");
  // grads: of x, modulation, w_x, b_x, w_c, b_c, w_g, b_g, w_y, b_y, of each block's w_h, then b_h, w_o and b_o, and of
  // each condition. A vector in the place of x's or a condition's asks for none.
  m.def(
      "interaction_network_backward(Tensor grad, Tensor x, Tensor[] conditions, Tensor timesteps, Tensor modulation, "
      "Tensor w_x, Tensor w_c, Tensor w_g, Tensor b_g, Tensor[] w_h, Tensor[] b_h, Tensor[] w_o, Tensor[] b_o, "
      "Tensor w_y, float dropout, Tensor seed, Tensor step, Tensor sample_ids, int stream, Tensor[] saved, "
      "Tensor(a!)[] grads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("interaction_network", TORCH_BOX(&interaction_network));
  m.impl("interaction_network_backward", TORCH_BOX(&interaction_network_backward));
}

}  // namespace seda

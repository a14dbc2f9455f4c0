// The reverse chain: one call for all steps and blocks of a stage. Rows go in blocks, whose activations bound the memory;
// gates and the embedded condition are made once for a block of rows. Formulas: reference.reverse_chain.
#include <algorithm>
#include <optional>

#include "product.h"
#include "sums.h"

namespace seda {
namespace {

// Rows of a block at most. Threads share a block's rows, and the vendor's GEMM packs the weights anew for each of them:
// on two threads of an Intel Xeon blocks of 1024 rows took 0.87 to 0.92 of the time that blocks of 256 did (1024 and 4096
// rows; 0.94 to 0.97 with our own products, no difference on one thread).
constexpr int64_t kBlockRows = 1024;
// Up to how many rows the weights stream through a product of their own: there the vendor's GEMM runs on one thread, and
// the weights' bandwidth is the bound.
constexpr int64_t kFewRows = 4;

using TensorList = std::vector<Tensor>;

// x @ matrix.T, for blocks of rows and steps without number.
struct Weight {
  Tensor matrix;
  RightFactor factor;
};

struct Network {
  Storage storage;
  ScalarType dtype;
  int64_t rows, dim, width, hidden, blocks, steps;
  Weight w_x, w_c, w_g, w_y;
  std::vector<Weight> w_h, w_o;
  const float *b_x, *b_c, *b_g, *b_y;
  std::vector<const float*> b_h, b_o;
  const float *coefficients, *modulation;
  bool uses_source;

  Tensor matrix_of(int64_t rows, int64_t columns) const { return empty({rows, columns}, dtype); }
  Weight weight_of(const Tensor& matrix) const { return {matrix, RightFactor(turned(matrix), std::min(rows, kBlockRows))}; }
  // (5,): a, b, c, e, w.
  const float* step_coefficients(int64_t step) const { return coefficients + 5 * step; }
  const float* step_modulation(int64_t step) const { return modulation + 3 * step * blocks * width; }
};

struct Counters {
  int64_t seed, step, stream;
  const int64_t* sample_ids;

  // The counter step of the noise that follows a chain's step; wraps as the counter does.
  int64_t step_after(int64_t i) const {
    return static_cast<int64_t>(static_cast<uint64_t>(step) + 1 + static_cast<uint64_t>(i));
  }
};

// out = x @ weight.T, all of one storage.
void multiply(const Network& net, const Tensor& x, const Weight& weight, const Tensor& out) {
  if (x.size(0) > kFewRows) {
    weight.factor.multiply(x, out);
    return;
  }
  const Tensor& w = weight.matrix;
  const ProductArguments a{net.storage, new_matrix(x), new_matrix(w), new_matrix(out), x.size(0), x.size(1)};
  parallel_rows(w.size(0), x.size(1), [&a](int64_t begin, int64_t end) { kernels().product(a, begin, end); });
}

// w_x @ w_y, with which a step without noise stays in the network's space.
struct Folding {
  Weight weight;
  std::vector<float> bias;  // w_x @ b_y

  explicit Folding(const Network& net) : bias(static_cast<size_t>(net.width)) {
    const Tensor product = net.matrix_of(net.width, net.width);
    multiply_into(net.w_x.matrix, net.w_y.matrix, product);
    weight = net.weight_of(product);
    Tensor b_y = empty({1, net.dim}, ScalarType::Float), moved = net.matrix_of(1, net.width);
    std::copy(net.b_y, net.b_y + net.dim, data(b_y));
    multiply(net, torch::stable::to(b_y, net.dtype), net.w_x, moved);
    const Tensor result = torch::stable::to(moved, ScalarType::Float);
    std::copy(data(result), data(result) + net.width, bias.begin());
  }
};

// One block of rows on its way through the steps.
class Block {
 public:
  Block(const Network& net, const Tensor& condition)
      : net_(net),
        rows_(condition.size(0)),
        zero_(static_cast<size_t>(rows_), 0),
        condition_(net.matrix_of(rows_, net.width)),
        gates_(net.matrix_of(rows_, net.blocks * net.hidden)),
        h_(net.matrix_of(rows_, net.width)),
        z_(net.matrix_of(rows_, net.width)),
        wide_(net.matrix_of(rows_, net.hidden)),
        residual_(net.matrix_of(rows_, net.width)) {
    multiply(net_, condition, net_.w_c, condition_);
    add(condition_, nullptr, net_.b_c, 0.0f);
    plain_norm(condition_, condition_);
    multiply(net_, condition_, net_.w_g, gates_);
    add(gates_, nullptr, net_.b_g, 1.0f);
  }

  // Steps in the data's space; x is overwritten.
  void run(const Tensor& x, const Tensor& source, float* result, const Counters& counters) {
    const Tensor estimate = net_.matrix_of(rows_, net_.dim);
    for (int64_t step = 0; step < net_.steps; ++step) {
      multiply(net_, x, net_.w_x, h_);
      add(h_, &condition_, net_.b_x, 0.0f);
      run_blocks(step, nullptr);
      multiply(net_, z_, net_.w_y, estimate);
      const float* k = net_.step_coefficients(step);
      finish_step({net_.storage, new_matrix(estimate), new_matrix(x), new_matrix(source), net_.dim, counters.seed,
                   counters.step_after(step), counters.stream, counters.sample_ids, net_.b_y, result, k[0], k[1], k[2],
                   k[3], k[4], step + 1 == net_.steps});
    }
  }

  // The same without noise: u = x @ w_x.T moves by the folded product, and as the result is linear in n(h_L), only
  // its weighted sum goes back to the data's space, once. Saves 2 D d - d d multiplications a row and step.
  void run(const Tensor& x, const Tensor& source, float* result, const Folding& folding) {
    const Tensor moved = net_.matrix_of(rows_, net_.width), sources = net_.matrix_of(rows_, net_.width);
    const Tensor u = zeros(rows_, net_.width), total = zeros(rows_, net_.width);
    if (net_.uses_source) multiply(net_, source, net_.w_x, sources);
    multiply(net_, x, net_.w_x, moved);
    const std::vector<float> no_bias(static_cast<size_t>(net_.width), 0.0f);
    FoldedStepArguments a{net_.storage, new_matrix(moved), net_.uses_source ? new_matrix(sources) : Matrix{nullptr, 0},
                          new_matrix(condition_), new_matrix(h_), net_.width, no_bias.data(), net_.b_x, data(u), 1.0f,
                          0.0f, 0.0f};
    std::vector<float> bias(net_.b_y, net_.b_y + net_.dim);
    float weight_sum = 0.0f;
    for (int64_t step = 0; step < net_.steps; ++step) {
      parallel_rows(rows_, net_.width, [&a](int64_t begin, int64_t end) { kernels().folded_step(a, begin, end); });
      run_blocks(step, data(total));
      const float* k = net_.step_coefficients(step);
      weight_sum += k[4];
      if (step + 1 == net_.steps) break;
      multiply(net_, z_, folding.weight, moved);
      a.bias = folding.bias.data(), a.a = k[0], a.b = k[1], a.c = k[2];
    }
    for (float& value : bias) value *= weight_sum;
    const Tensor estimate = net_.matrix_of(rows_, net_.dim);
    multiply(net_, torch::stable::to(total, net_.dtype), net_.w_y, estimate);
    finish_step({net_.storage, new_matrix(estimate), new_matrix(estimate), new_matrix(estimate), net_.dim, 0, 0, 0,
                 nullptr, bias.data(), result, 0.0f, 0.0f, 0.0f, 0.0f, 1.0f, true});
  }

 private:
  void add(const Tensor& m, const Tensor* other, const float* bias, float constant) {
    const AddArguments a{net_.storage, new_matrix(m), other ? new_matrix(*other) : Matrix{nullptr, 0}, m.size(1), bias,
                         constant};
    parallel_rows(rows_, a.columns, [&a](int64_t begin, int64_t end) { kernels().add(a, begin, end); });
  }

  void plain_norm(const Tensor& h, const Tensor& y) {
    const PlainNormArguments a{net_.storage, new_matrix(h), new_matrix(y), net_.width};
    parallel_rows(rows_, a.columns, [&a](int64_t begin, int64_t end) { kernels().plain_norm(a, begin, end); });
  }

  void finish_step(const ChainStepArguments& a) {
    parallel_rows(rows_, a.columns, [&a](int64_t begin, int64_t end) { kernels().chain_step(a, begin, end); });
  }

  // From h to n(h_L) in z; total += w * n(h_L) where it is not null.
  void run_blocks(int64_t step, float* total) {
    const float* modulation = net_.step_modulation(step);
    NormArguments norm{};
    norm.storage = net_.storage, norm.columns = net_.width, norm.timesteps = zero_.data();
    norm.h = new_matrix(h_), norm.z = new_matrix(z_);
    norm.shift = {modulation, 0}, norm.scale = {modulation + net_.width, 0};
    parallel_rows(rows_, net_.width, [&](int64_t begin, int64_t end) { kernels().modulated_norm(norm, begin, end); });
    ResidualNormArguments last{};
    last.total = total, last.weight = net_.step_coefficients(step)[4];
    for (int64_t block = 0; block < net_.blocks; ++block, modulation += 3 * net_.width) {
      ResidualNormArguments a = block + 1 == net_.blocks ? last : ResidualNormArguments{};
      // The norm is already the next block's; the last one's is plain.
      const float* next = modulation + 3 * net_.width;
      if (block + 1 < net_.blocks) a.shift = {next, 0}, a.scale = {next + net_.width, 0};
      a.alpha = {modulation + 2 * net_.width, 0};
      interact(block, a);
    }
  }

  // From the block's modulated norm in z to the next state in h and its norm in z.
  void interact(int64_t block, ResidualNormArguments a) {
    const size_t b = static_cast<size_t>(block);
    multiply(net_, z_, net_.w_h[b], wide_);
    SiluArguments silu{};
    silu.storage = net_.storage, silu.columns = net_.hidden, silu.bias = net_.b_h[b];
    silu.pre = silu.hidden = new_matrix(wide_);
    silu.gate = columns_of(gates_, block * net_.hidden);
    parallel_rows(rows_, 4 * net_.hidden, [&](int64_t begin, int64_t end) { kernels().gated_silu(silu, begin, end); });
    multiply(net_, wide_, net_.w_o[b], residual_);
    a.storage = net_.storage, a.columns = net_.width, a.timesteps = zero_.data(), a.bias = net_.b_o[b];
    a.h = a.h_next = new_matrix(h_), a.residual = new_matrix(residual_), a.z = new_matrix(z_);
    parallel_rows(rows_, 2 * net_.width, [&](int64_t begin, int64_t end) { kernels().residual_norm(a, begin, end); });
  }

  Matrix columns_of(const Tensor& m, int64_t first) const {
    const int64_t size = net_.storage == Storage::float32 ? 4 : 2;
    return {static_cast<char*>(m.mutable_data_ptr()) + first * size, m.stride(0)};
  }

  const Network& net_;
  int64_t rows_;
  std::vector<int64_t> zero_;  // each row's place in the modulation of one step
  Tensor condition_, gates_, h_, z_, wide_, residual_;
};

Weight weight(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, const Network& net) {
  matrix(tensor, name, rows, columns, net.storage);
  if (!tensor.is_contiguous()) refuse(name, " must be contiguous");
  return net.weight_of(tensor);
}

void check_blocks(Network& net, const TensorList& w_h, const TensorList& b_h, const TensorList& w_o,
                  const TensorList& b_o) {
  const size_t blocks = w_h.size();
  if (blocks == 0 || b_h.size() != blocks || w_o.size() != blocks || b_o.size() != blocks)
    refuse("w_h, b_h, w_o and b_o must hold one tensor for each block, and at least one");
  check(w_h[0], "w_h[0]", {-1, net.width});
  net.blocks = static_cast<int64_t>(blocks);
  net.hidden = w_h[0].size(0);
  for (size_t i = 0; i < blocks; ++i) {
    const auto name = [i](const char* list) { return std::string(list) + "[" + std::to_string(i) + "]"; };
    net.w_h.push_back(weight(w_h[i], name("w_h").c_str(), net.hidden, net.width, net));
    net.w_o.push_back(weight(w_o[i], name("w_o").c_str(), net.width, net.hidden, net));
    net.b_h.push_back(floats(b_h[i], name("b_h").c_str(), {net.hidden}));
    net.b_o.push_back(floats(b_o[i], name("b_o").c_str(), {net.width}));
  }
}

// Whether the folded product, made once, costs less than it saves over all rows and steps.
bool folding_pays(const Network& net, int64_t rows) {
  const int64_t saved = (net.steps - 1) * rows * (2 * net.dim - net.width);
  return saved > 2 * net.dim * net.width;
}

Tensor reverse_chain(const Tensor& initial, const Tensor& source, const Tensor& condition, const Tensor& coefficients,
                     const Tensor& modulation, const Tensor& w_x, const Tensor& b_x, const Tensor& w_c,
                     const Tensor& b_c, const Tensor& w_g, const Tensor& b_g, TensorList w_h, TensorList b_h,
                     TensorList w_o, TensorList b_o, const Tensor& w_y, const Tensor& b_y, const Tensor& seed,
                     const Tensor& step, const Tensor& sample_ids, int64_t stream, bool noisy) {
  Network net{};
  net.storage = storage_of(initial, "initial");
  net.dtype = initial.scalar_type();
  matrix(initial, "initial", -1, -1, net.storage);
  const int64_t rows = net.rows = initial.size(0);
  net.dim = initial.size(1);
  matrix(source, "source", rows, net.dim, net.storage);
  matrix(condition, "condition", rows, -1, net.storage);
  matrix(w_x, "w_x", -1, net.dim, net.storage);
  net.width = w_x.size(0);
  check_blocks(net, w_h, b_h, w_o, b_o);
  net.w_x = weight(w_x, "w_x", net.width, net.dim, net);
  net.w_c = weight(w_c, "w_c", net.width, condition.size(1), net);
  net.w_g = weight(w_g, "w_g", net.blocks * net.hidden, net.width, net);
  net.w_y = weight(w_y, "w_y", net.dim, net.width, net);
  net.b_x = floats(b_x, "b_x", {net.width}), net.b_c = floats(b_c, "b_c", {net.width});
  net.b_g = floats(b_g, "b_g", {net.blocks * net.hidden}), net.b_y = floats(b_y, "b_y", {net.dim});
  net.coefficients = floats(coefficients, "coefficients", {-1, 5});
  net.steps = coefficients.size(0);
  net.modulation = floats(modulation, "modulation", {net.steps, net.blocks, 3, net.width});
  for (int64_t i = 0; i < net.steps; ++i) net.uses_source |= net.step_coefficients(i)[2] != 0.0f;
  const Counters counters{counter(seed, "seed"), counter(step, "step"), check_stream(stream),
                          integers(sample_ids, "sample_ids", rows)};
  const Tensor result = zeros(rows, net.dim);
  std::optional<Folding> folding;
  if (!noisy && folding_pays(net, rows)) folding.emplace(net);
  const int64_t parts = net.steps > 0 ? (rows + kBlockRows - 1) / kBlockRows : 0;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = rows * i / parts, count = rows * (i + 1) / parts - begin;
    const auto part = [&](Tensor whole) { return torch::stable::narrow(whole, 0, begin, count); };
    Block block(net, part(condition));
    float* out = data(result) + begin * net.dim;
    if (folding)
      block.run(part(initial), part(source), out, *folding);
    else
      block.run(torch::stable::clone(torch::stable::contiguous(part(initial))), part(source), out,
                {counters.seed, counters.step, counters.stream, counters.sample_ids + begin});
  }
  return torch::stable::to(result, net.dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seda_fast_cpp, m) {
  m.def(
      "reverse_chain(Tensor initial, Tensor source, Tensor condition, Tensor coefficients, Tensor modulation, "
      "Tensor w_x, Tensor b_x, Tensor w_c, Tensor b_c, Tensor w_g, Tensor b_g, Tensor[] w_h, Tensor[] b_h, "
      "Tensor[] w_o, Tensor[] b_o, Tensor w_y, Tensor b_y, Tensor seed, Tensor step, Tensor sample_ids, int stream, "
      "bool noisy) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(seda_fast_cpp, CompositeExplicitAutograd, m) { m.impl("reverse_chain", TORCH_BOX(&reverse_chain)); }

}  // namespace seda

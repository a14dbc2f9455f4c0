// The row kernels' table: what each instruction set provides, on bare pointers. No C++ library header may enter here
// (see simd.h).
#pragma once

#include <stdint.h>

namespace seda {

enum class Storage { float32, bfloat16 };

// Row i of a matrix starts at data + i * stride elements; a row's elements are contiguous.
struct Matrix {
  void* data;
  int64_t stride;
};

// A table of float32 rows by timestep.
struct Table {
  const float* data;
  int64_t stride;
};

struct NoisingArguments {
  Storage storage;
  Matrix x0, x;
  int64_t columns, seed, step, stream;
  const int64_t* sample_ids;
  const int64_t* timesteps;
  const float *signal, *noise;
};

// m += constant (+ bias and other, where their data is not null).
struct AddArguments {
  Storage storage;
  Matrix m, other;
  int64_t columns;
  const float* bias;
  float constant;
};

// y = n(h); y may be h itself.
struct PlainNormArguments {
  Storage storage;
  Matrix h, y;
  int64_t columns;
};

// One step's end in the data's space: x0_hat = product + bias, result += w x0_hat, and unless it is the last step
// x = a x0_hat + b x + c source + e eps.
struct ChainStepArguments {
  Storage storage;
  Matrix product, x, source;
  int64_t columns, seed, step, stream;
  const int64_t* sample_ids;
  const float* bias;
  float* result;  // (rows, columns)
  float a, b, c, e, w;
  bool last;
};

// One step's end in the network's space: u = a (product + bias) + b u + c source, h = u + input_bias + condition.
struct FoldedStepArguments {
  Storage storage;
  Matrix product, source, condition, h;
  int64_t columns;
  const float *bias, *input_bias;
  float* u;  // (rows, columns)
  float a, b, c;
};

// out[i][o] = sum over k of x[i][k] * weight[o][k], for a few rows i; threads share the outputs o.
struct ProductArguments {
  Storage storage;
  Matrix x, weight, out;
  int64_t rows, columns;
};

// Element e of line l at data[l * line + e * element]; line or element is 1. The lines of a product's first factor are
// its rows, those of the second its columns.
struct Factor {
  const float* data;
  int64_t line, element;
};

// out (+)= a @ b (+ bias, where it is not null) for a (rows, depth), b (depth, columns) as `pack` leaves it.
struct TilesArguments {
  Factor a;
  const float *b, *bias;
  bool adds;
  float* out;  // rows `stride` apart
  int64_t stride, rows, columns, depth;
  float* block;  // room for RowKernels::block_size values, the thread's own
};

// z = n(h) * (1 + scale[tau]) + shift[tau]; backward: z is the gradient of z, grad that of h that comes past the norm.
// Backward, no data in grad or scale stand for zeros, and grad_h may be grad itself.
struct NormArguments {
  Storage storage;
  Matrix h, z, grad, grad_h;
  int64_t columns;
  const int64_t* timesteps;
  Table shift, scale;
  bool sums_result;  // backward: columns_sum takes grad_h's sum over the rows
};

// h_next = h + (1 + alpha[tau]) * (residual + bias), z = n(h_next) * (1 + scale[tau]) + shift[tau], and where total is
// not null total += weight * z. No data in alpha, or in scale and shift, stand for zeros. h_next may be h itself.
struct ResidualNormArguments {
  Storage storage;
  Matrix h, residual, h_next, z;
  int64_t columns;
  const float* bias;
  const int64_t* timesteps;
  Table alpha, shift, scale;
  float* total;  // (rows, columns)
  float weight;
};

// hidden = silu(pre) * gate * keep / (1 - dropout); backward: hidden holds its gradient and becomes that of pre.
struct SiluArguments {
  Storage storage;
  const float* bias;       // added to pre first; null where pre has it already
  const float* gate_bias;  // the same of gate
  Matrix pre, gate, hidden, grad_gate;
  int64_t columns, seed, step, stream;
  const int64_t* sample_ids;
  int32_t threshold;  // dropout keeps a word w where (w >> 8) >= threshold; 0 draws nothing
  float kept;         // 1 / (1 - dropout)
};

// result = h + (1 + alpha[tau]) * residual; backward: h is the gradient of that, result becomes residual's.
struct ResidualArguments {
  Storage storage;
  const float* bias;  // added to residual first; null where residual has it already
  Matrix h, residual, result;
  int64_t columns;
  const int64_t* timesteps;
  Table alpha;
};

// One block of logits: all of a few rows' products with classes first_class .. first_class + columns - 1, with the bias but
// without the temperature. Backward: the block becomes its own gradient.
struct LogitsArguments {
  Storage storage;
  Matrix logits;
  int64_t columns, first_class;
  float scale;            // 1 / temperature
  const int64_t* labels;  // (rows,), negative where a row does not count
  float* state;           // (rows, 4): running max, sum of exp(logit - max), true logit, sum of logits
  // Backward only: log-sum-exp of the whole rows, gradient of one logit's term, label_smoothing / K and 1 - smoothing.
  const float* log_normaliser;
  float grad, smoothing, certainty;
};

// Features against their class's centre: the sum of squares of each row, or its gradient.
struct CentreArguments {
  Storage storage;
  Matrix features, centres, grad;
  int64_t columns;
  const int64_t* labels;
  float* distance;  // (rows,)
  float scale;      // backward: grad += scale * (features - centre), and the class's sum loses the same
};

// The optimiser's step on one tensor: grad *= clip, then AdamW, then average moves by `moved` of the way to the weight.
struct UpdateArguments {
  const float* grad;
  float *weight, *exp_avg, *exp_avg_sq, *average;
  float clip, decay, new_average, old_square, new_square, step_size, square_scale, epsilon, moved;
};

// Where a backward part leaves sums over rows, in an order that the number of threads does not change.
struct SegmentedSums {
  int64_t columns;
  const int64_t* order;  // rows, ascending by key: timestep or class
  float* columns_sum;    // (chunks, columns)
  float* gates_sum;      // the same for the gates' gradient, or null
  float* table[2];       // (T or K, columns) each, rows table_stride apart; rows of keys that occur need no zeros
  int64_t table_stride;
  float* head[2];        // (chunks, columns) each, for a chunk's first key where it began in an earlier chunk
};

struct RowKernels {
  const char* name;
  // x = signal[tau] * x0 + noise[tau] * eps for rows begin .. end - 1.
  void (*noising)(const NoisingArguments&, int64_t begin, int64_t end);
  // grad * signal[tau] from x0 to x; noise and the counters are unused.
  void (*noising_backward)(const NoisingArguments&, int64_t begin, int64_t end);
  // Pairs of normals from pairs of 24-bit words begin .. end - 1, for tests of the transform's corners.
  void (*box_muller)(const int32_t* words, float* normals, int64_t begin, int64_t end);
  void (*modulated_norm)(const NormArguments&, int64_t begin, int64_t end);
  void (*gated_silu)(const SiluArguments&, int64_t begin, int64_t end);
  void (*gated_residual)(const ResidualArguments&, int64_t begin, int64_t end);
  void (*residual_norm)(const ResidualNormArguments&, int64_t begin, int64_t end);
  // The backward parts take one chunk of rows: places begin .. end - 1 of the order (rows themselves for gated_silu).
  void (*modulated_norm_backward)(const NormArguments&, const SegmentedSums&, int64_t chunk, int64_t begin,
                                  int64_t end);
  void (*gated_silu_backward)(const SiluArguments&, const SegmentedSums&, int64_t chunk, int64_t begin, int64_t end);
  void (*gated_residual_backward)(const ResidualArguments&, const SegmentedSums&, int64_t chunk, int64_t begin,
                                  int64_t end);
  // The matrix's own sum over the rows, into columns_sum.
  void (*column_sums)(const AddArguments&, const SegmentedSums&, int64_t chunk, int64_t begin, int64_t end);
  void (*add)(const AddArguments&, int64_t begin, int64_t end);
  void (*plain_norm)(const PlainNormArguments&, int64_t begin, int64_t end);
  void (*chain_step)(const ChainStepArguments&, int64_t begin, int64_t end);
  void (*folded_step)(const FoldedStepArguments&, int64_t begin, int64_t end);
  void (*product)(const ProductArguments&, int64_t begin, int64_t end);
  // Products of any size: panels have tile_rows rows of the first factor or tile_columns columns of the second, which
  // lie in panels of (depth, tile_columns). `pack` takes panels begin .. end - 1 of `lines` columns.
  int64_t tile_rows, tile_columns, block_size;
  void (*pack)(const Factor&, int64_t lines, int64_t depth, float* to, int64_t begin, int64_t end);
  void (*product_tiles)(const TilesArguments&, int64_t begin, int64_t end, int64_t first_column_panel,
                        int64_t last_column_panel);
  void (*logits)(const LogitsArguments&, int64_t begin, int64_t end);
  void (*logits_backward)(const LogitsArguments&, const SegmentedSums&, int64_t chunk, int64_t begin, int64_t end);
  void (*centre)(const CentreArguments&, int64_t begin, int64_t end);
  void (*centre_backward)(const CentreArguments&, const SegmentedSums&, int64_t chunk, int64_t begin, int64_t end);
  // The sum of squares of n elements.
  float (*squares)(const float* x, int64_t n);
  void (*weight_update)(const UpdateArguments&, int64_t begin, int64_t end);
};

const RowKernels& baseline_kernels();
#if defined(__x86_64__)
const RowKernels& avx2_kernels();
const RowKernels& avx512_kernels();
#endif

}  // namespace seda

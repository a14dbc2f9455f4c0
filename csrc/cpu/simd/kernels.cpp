// Compiled once per instruction set, with -DSEDA_ISA=baseline, avx2 or avx512 and the matching target flags.
#include "interaction.h"
#include "matrix_product.h"
#include "noising.h"
#include "projection.h"
#include "reverse_chain.h"
#include "weight_update.h"

#define SEDA_JOIN_(a, b) a##b
#define SEDA_JOIN(a, b) SEDA_JOIN_(a, b)
#define SEDA_STRING_(a) #a
#define SEDA_STRING(a) SEDA_STRING_(a)

namespace seda {

const RowKernels& SEDA_JOIN(SEDA_ISA, _kernels)() {
  static const RowKernels kernels = {
      .name = SEDA_STRING(SEDA_ISA),
      .noising = SEDA_ISA::noising,
      .noising_backward = SEDA_ISA::noising_backward,
      .box_muller = SEDA_ISA::box_muller,
      .modulated_norm = SEDA_ISA::modulated_norm,
      .gated_silu = SEDA_ISA::gated_silu,
      .gated_residual = SEDA_ISA::gated_residual,
      .residual_norm = SEDA_ISA::residual_norm,
      .modulated_norm_backward = SEDA_ISA::modulated_norm_backward,
      .gated_silu_backward = SEDA_ISA::gated_silu_backward,
      .gated_residual_backward = SEDA_ISA::gated_residual_backward,
      .column_sums = SEDA_ISA::column_sums,
      .add = SEDA_ISA::add,
      .plain_norm = SEDA_ISA::plain_norm,
      .chain_step = SEDA_ISA::chain_step,
      .folded_step = SEDA_ISA::folded_step,
      .product = SEDA_ISA::product,
      .tile_rows = SEDA_ISA::kTileRows,
      .tile_columns = SEDA_ISA::kTileColumns,
      .block_size = SEDA_ISA::kBlockPanels * SEDA_ISA::kTileRows * SEDA_ISA::kDepth,
      .pack = SEDA_ISA::pack,
      .product_tiles = SEDA_ISA::product_tiles,
      .logits = SEDA_ISA::logits,
      .logits_backward = SEDA_ISA::logits_backward,
      .centre = SEDA_ISA::centre,
      .centre_backward = SEDA_ISA::centre_backward,
      .squares = SEDA_ISA::squares,
      .weight_update = SEDA_ISA::weight_update,
  };
  return kernels;
}

}  // namespace seda

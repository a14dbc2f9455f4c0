"""The operations: each checks its arguments and calls one registered op, ``torch.ops.seda_fast.NAME``.

Beside them the small pieces of the definition that need no kernel of their own.
"""

from ..reference import embed_condition, layer_norm
from . import cpp, cuda  # registers the C++ and the CUDA backend
from ._cpp import status as cpp_status
from ._cuda import status as cuda_status
from ._dispatch import BACKENDS, choose, forced, operations, references, refusal, use_backend
from .cpp.read_rows import read_rows, reads_rows
from .interaction import chained_interaction_block, interaction_block
from .interaction_network import interaction_network
from .memory import AttentionChoice, attention_choice, memory_read
from .noising import q_sample
from .projection import semantic_projection
from .reverse_chain import ChainWeights, reverse_chain
from .timesteps import stratified_timesteps
from .weight_update import gradient_norm, updates_in_one_pass, weight_update

__all__ = [
    "BACKENDS",
    "AttentionChoice",
    "ChainWeights",
    "attention_choice",
    "chained_interaction_block",
    "choose",
    "cpp",
    "cpp_status",
    "cuda",
    "cuda_status",
    "embed_condition",
    "forced",
    "gradient_norm",
    "interaction_block",
    "interaction_network",
    "layer_norm",
    "memory_read",
    "operations",
    "q_sample",
    "read_rows",
    "reads_rows",
    "references",
    "refusal",
    "reverse_chain",
    "semantic_projection",
    "stratified_timesteps",
    "updates_in_one_pass",
    "use_backend",
    "weight_update",
]

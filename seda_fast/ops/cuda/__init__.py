"""The operations on the kernels of csrc/cuda, a file an operation; importing this registers them."""

from . import reverse_chain

__all__ = ["reverse_chain"]

"""The operations on the kernels of csrc/cuda, a file an operation; importing this registers them."""

from . import noising, reverse_chain

__all__ = ["noising", "reverse_chain"]

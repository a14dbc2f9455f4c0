"""The operations on the C++ operators of csrc/cpu, a file an operation; importing this registers them."""

from . import interaction, noising, projection, reverse_chain

__all__ = ["interaction", "noising", "projection", "reverse_chain"]

"""The operations on the C++ operators of csrc/cpu, a file an operation; importing this registers them."""

from . import interaction, interaction_network, noising, projection, reverse_chain, weight_update

__all__ = ["interaction", "interaction_network", "noising", "projection", "reverse_chain", "weight_update"]

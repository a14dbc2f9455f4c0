"""Triton kernels of seda_fast, one file for each operation; installed as ``seda_fast.kernels``."""

"""Kernels for packed patching: each beside the torch reference that runs without a GPU."""

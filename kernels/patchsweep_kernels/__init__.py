"""Triton kernels for packed batches, each beside a torch reference that runs without a GPU."""

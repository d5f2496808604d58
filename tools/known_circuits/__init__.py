"""Transformers compiled from known programs, and how well each method finds their circuits."""

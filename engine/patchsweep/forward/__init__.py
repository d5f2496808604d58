"""One forward pass through the plain Hugging Face modules."""

"""Forward passes through the plain Hugging Face modules behind a bridge."""

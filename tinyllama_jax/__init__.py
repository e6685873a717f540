"""Pre-training of a ~1B Llama in JAX."""

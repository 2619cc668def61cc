"""Operations: a reference that runs anywhere, kernels that override it; imports jax alone."""

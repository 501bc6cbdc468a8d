"""awrsr_jax: attention weight refinement for sequential recommenders, in JAX and Flax."""

__version__ = "0.1.0"

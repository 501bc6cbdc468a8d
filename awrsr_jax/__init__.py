"""awrsr_jax: attention weight refinement for sequential recommenders, in JAX and Flax."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
  """Gives `awrsr_jax.load`, see inference/trained.py; importing the package alone imports nothing else."""
  if name == "load":
    from awrsr_jax.inference.trained import load
    return load
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

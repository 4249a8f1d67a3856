"""mor_jax: recursive-depth language models in JAX (Mixture-of-Recursions, arXiv 2507.10524)."""

__version__ = "0.2.0"

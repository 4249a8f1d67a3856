"""PyTorch code that is written beside exported weights.

These files are copied as they are and run without this project: they import torch and transformers
and nothing of mor_jax. Nothing of mor_jax imports them.
"""

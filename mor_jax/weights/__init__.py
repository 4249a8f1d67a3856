"""Weights of other tools: read into checkpoints of this project, and written from them."""

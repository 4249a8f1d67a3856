"""Recursive Language Models: the prompt is a variable in a sandboxed Python REPL (to be built on this package)."""

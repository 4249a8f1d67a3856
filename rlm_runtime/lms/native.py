"""The model of this package: `--root native`, or `resolve("native")`. No key, no network; it needs the extra `jax`.

A small Mixture-of-Recursions model trained from scratch to lead this runtime (docs/native.md). It finds the values that a
text of any length gives for a key; it says so where a question is of another kind. `weights/` holds it, and in
`weights/model.json` how it was made and measured.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.lms.checkpoint import CheckpointLM

WEIGHTS = Path(__file__).parent / "weights"
SORRY = "not in my competence"  # its answer to other questions
HINT = (
    'The model of this package finds the values that a text gives for a key, as in "What is the code for K7?". For '
    "other questions name a model: --root openai:MODEL (or anthropic:MODEL)."
)


class NativeLM(CheckpointLM):
    """As `CheckpointLM`, of the weights in this package.

    Raises:
      UsageError: no jax here.
    """

    def __init__(self, path: str = "", *, max_tokens: int = 256, lanes: int = 4, **options: Any):
        if path:
            raise UsageError(f"unknown model 'native:{path}'. The model of this package is named native.")
        super().__init__(str(WEIGHTS), max_tokens=max_tokens, lanes=lanes, **options)
        self.name = "native"


def available() -> bool:
    """Whether it is here with what it needs; nothing is imported."""
    return (WEIGHTS / "model.json").is_file() and all(find_spec(name) for name in ("jax", "mor_jax"))

"""Runs in, page out: what the report shows that needs the models themselves."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.analysis.report import write_report
from mor_jax.analysis.runs import RunRecord
from mor_jax.analysis.tables import print_table
from mor_jax.errors import CheckpointError, UserError
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import stream_text
from mor_jax.model.lm import CAUSAL
from mor_jax.train.load import Loaded, load_model

FALLBACK_TEXT = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n"
PROMPT_CHARACTERS = 40


def depths_of(loaded: Loaded, text: str) -> tuple[list[str], list[int]]:
    """Tokens of `text` (as much of it as the context holds) and the causal depth of each."""
    ids = [loaded.tokenizer.bos, *loaded.tokenizer.encode(text)][: loaded.lm.model.context]
    with jax.set_mesh(loaded.mesh):
        forward = jax.jit(lambda p, t: loaded.lm.forward(p, t, mode=CAUSAL).depth_BxT)
        depths = np.asarray(forward(loaded.params, jnp.asarray([ids], jnp.int32)))[0]
    return [loaded.tokenizer.token_text(i) for i in ids[1:]], depths[1:].tolist()


def continuation(loaded: Loaded, text: str, *, max_tokens: int = 160, seed: int = 0) -> str:
    """The first words of `text` and what the model makes of them."""
    cut = text[:PROMPT_CHARACTERS]
    prompt = cut[: max(cut.rfind(" "), cut.rfind("\n"))] or cut
    room = loaded.lm.model.context - len(loaded.tokenizer.encode(prompt)) - 1
    pieces = stream_text(
        loaded, prompt, max_tokens=max(1, min(max_tokens, room)), sampling=Sampling(0.7, top_p=0.95), seed=seed
    )
    return "".join(piece.text for piece in pieces)


def present(runs: Sequence[str | Path], out: str | Path, *, text: str | None = None, table: bool = True) -> Path:
    """Print the comparison table and write the page.

    Args:
      runs: run directories, finished or not.
      text: for the depth maps and the prompts; default: the held-out passage the first run left.
    Raises:
      UserError: a directory is not a run, or the page cannot be written.
    """
    records = _distinct([RunRecord.load(path) for path in runs])
    if text is None:
        kept = [path for run in runs if (path := Path(run) / "sample.txt").exists()]
        text = kept[0].read_text(encoding="utf-8") if kept else FALLBACK_TEXT
    maps, samples = {}, {}
    for i, (path, record) in enumerate(zip(runs, records, strict=True)):
        try:
            loaded = load_model(path)
        except CheckpointError as e:  # a run that has not saved yet still has curves to show
            records[i] = dataclasses.replace(record, notes=(*record.notes, f"no depth map and no sample: {e}"))
            continue
        if record.routed:
            tokens, depths = depths_of(loaded, text)
            maps[record.name] = (tokens, depths, loaded.lm.program.recursions)
        samples[record.name] = continuation(loaded, text)
    if table:
        print_table(records)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return write_report(records, out, depth_maps=maps, samples=samples)
    except OSError as e:
        raise UserError(f"cannot write the page {out}: {e.strerror or e}.") from e


def _distinct(records: list[RunRecord]) -> list[RunRecord]:
    """Runs of the same name are told apart by their directories."""
    names = Counter(r.name for r in records)
    return [r if names[r.name] == 1 else dataclasses.replace(r, name=f"{r.name} ({r.path})") for r in records]

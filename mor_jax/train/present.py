"""Builds the report page from run directories, with the parts that need the models."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mor_jax.analysis.report import write_report
from mor_jax.analysis.runs import RunRecord
from mor_jax.analysis.tables import print_table
from mor_jax.analysis.token_classes import by_class, looks_like_code
from mor_jax.errors import CheckpointError, UserError
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import stream_text
from mor_jax.model.lm import CAUSAL, LM
from mor_jax.model.loss import next_token_targets
from mor_jax.paths import as_path
from mor_jax.train.load import Loaded, load_model

FALLBACK_TEXT = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n"
PROMPT_CHARACTERS = 40
STRETCHES = 16  # contexts of the sample text that are read for the depths by token class
CURVE = "depth_curve.json"


class DepthReading(NamedTuple):
    """Text as a model read it, causally."""

    tokens: list[str]
    depths: list[int]
    # nats, of the prediction made at each token; None at the end of a stretch
    nlls: list[float | None]


def read(loaded: Loaded, text: str, *, stretches: int = STRETCHES) -> DepthReading:
    """Tokens of `text`, their causal depths, and the loss of the prediction made at each.

    Longer text than the context is cut into stretches that begin anew, at most so many; all are one
    shape.
    """
    context, tokenizer = loaded.lm.model.context, loaded.tokenizer
    ids, step = tokenizer.encode(text), context - 1
    found = DepthReading([], [], [])
    with jax.set_mesh(loaded.mesh):
        for start in range(0, min(len(ids), stretches * step), step):
            cut = ids[start : start + step]
            row, seg = np.zeros((2, 1, context), np.int32)
            # the first token has to be predicted from something
            row[0, : len(cut) + 1] = [tokenizer.bos, *cut]
            seg[0, : len(cut) + 1] = 1
            depth, nll = map(
                np.asarray, _look(loaded.lm, loaded.params, jnp.asarray(row), jnp.asarray(seg))
            )
            found.tokens.extend(tokenizer.token_text(i) for i in cut)
            found.depths.extend(depth[0, 1 : len(cut) + 1].tolist())
            found.nlls.extend([*nll[0, 1 : len(cut)].tolist(), None])
    return found


@functools.partial(jax.jit, static_argnums=0)
def _look(
    lm: LM, params: Any, tokens_BxT: jax.Array, seg_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    out = lm.forward(params, tokens_BxT, seg_BxT, mode=CAUSAL)
    targets, _ = next_token_targets(tokens_BxT, seg_BxT)
    return out.depth_BxT, lm.token_nll(params, out.h_BxTxD, targets)


def continuation(
    loaded: Loaded, text: str, *, max_tokens: int = 160, seed: int = 0
) -> tuple[str, list[int]]:
    """The first words of `text` and what the model makes of them, and the depth of every token of
    both."""
    cut = text[:PROMPT_CHARACTERS]
    prompt = cut[: max(cut.rfind(" "), cut.rfind("\n"))] or cut
    # A short context, of bytes perhaps, keeps half of itself for the continuation.
    while len(loaded.tokenizer.encode(prompt)) > max(1, loaded.lm.model.context // 2):
        prompt = prompt[:-1]
    room = loaded.lm.model.context - len(loaded.tokenizer.encode(prompt)) - 1
    pieces = list(
        stream_text(
            loaded,
            prompt,
            max_tokens=max(1, min(max_tokens, room)),
            sampling=Sampling(0.7, top_p=0.95),
            seed=seed,
        )
    )
    return "".join(piece.text for piece in pieces), [piece.depth for piece in pieces]


def curve_of(run: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `launch.depth_curve --out RUN/depth_curve` left in a run directory, if it did."""
    try:
        curve = json.loads((as_path(run) / CURVE).read_text(encoding="utf-8"))
        return curve if {"as_configured", "dial", "cap"} <= curve.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def present(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    text: str | None = None,
    table: bool = True,
) -> epath.Path:
    """Print the comparison table and write the page.

    Args:
      runs: run directories, finished or not.
      text: for the depth maps and the prompts; default: the held-out passage the first run left.
    Raises:
      UserError: a directory is not a run, or the page cannot be written.
    """
    records = _distinct([RunRecord.load(path) for path in runs])
    if text is None:
        kept = [path for run in runs if (path := as_path(run) / "sample.txt").exists()]
        text = kept[0].read_text(encoding="utf-8") if kept else FALLBACK_TEXT
    maps, samples, classes, decoded, curves = {}, {}, {}, {}, {}
    code = looks_like_code(text)
    for i, (path, record) in enumerate(zip(runs, records, strict=True)):
        try:
            loaded = load_model(path)
        except CheckpointError as e:  # a run that has not saved yet still has curves to show
            records[i] = dataclasses.replace(
                record, notes=(*record.notes, f"no depth map and no sample: {e}")
            )
            continue
        if record.routed:
            steps, found = loaded.lm.program.recursions, read(loaded, text)
            shown = loaded.lm.model.context - 1
            maps[record.name] = (found.tokens[:shown], found.depths[:shown], steps)
            classes[record.name] = by_class(*found, steps, code=code)
        samples[record.name], decoded[record.name] = continuation(loaded, text)
        if (curve := curve_of(path)) is not None:
            curves[record.name] = curve
    if table:
        print_table(records)
    out = as_path(out)
    try:
        return write_report(
            records,
            out,
            depth_maps=maps,
            samples=samples,
            classes=classes,
            decoded=decoded,
            curves=curves,
        )
    except OSError as e:
        raise UserError(f"cannot write the page {out}: {e.strerror or e}.") from e


def _distinct(records: list[RunRecord]) -> list[RunRecord]:
    """Adds the directory to the name of runs that share one."""
    names = Counter(r.name for r in records)
    return [
        r if names[r.name] == 1 else dataclasses.replace(r, name=f"{r.name} ({r.path})")
        for r in records
    ]

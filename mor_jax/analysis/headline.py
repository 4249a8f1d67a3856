"""The one thing to remember of a comparison, in sentences made from the numbers.

The sentences claim nothing the numbers do not hold: a worse result reads as worse, unequal budgets
are named, and an unfinished run is called that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mor_jax.analysis import accounting, tables, units
from mor_jax.analysis.runs import RunRecord
from mor_jax.config import Config

SAME_BUDGET = 0.02  # relative difference of training FLOPs that still counts as equal


@dataclass(frozen=True)
class Card:
    """One run at a glance."""

    name: str
    kind: str  # "Transformer, 8 layers"
    score: str  # bits per byte, or a dash
    facts: tuple[str, ...]
    best: bool
    unfinished: bool


@dataclass(frozen=True)
class Headline:
    sentences: tuple[str, ...]
    cards: tuple[Card, ...]


def headline(runs: Sequence[RunRecord]) -> Headline:
    """Compare every run with the baseline: the first plain Transformer, else the first run."""
    scores = [tables.bits_per_byte(run) for run in runs]
    known = [s for s in scores if s is not None]
    base = baseline(runs)
    # Without a common text there is nothing to compare, only scores to name.
    same_text = len({_validation(run.config) for run in runs if run.config}) < 2
    sentences = (
        [_versus(run, base) for run in runs if run is not base]
        if same_text
        else [_apart(runs, scores)]
    )
    if not known:
        sentences = ["No run has been evaluated yet."]
    elif len(runs) == 1 and scores[0] is not None:
        sentences = [
            f"{runs[0].name} reaches {units.fixed(scores[0])} bits per byte after {runs[0].steps:,} steps."
        ]
    sentences += _floor(runs, scores)
    unfinished = [run.name for run in runs if not run.finished]
    if unfinished:
        sentences.append(f"Not finished: {', '.join(unfinished)}; numbers are of the last record.")
    cards = tuple(
        Card(
            name=run.name,
            kind=describe(run),
            score=units.fixed(score),
            facts=_facts(run),
            best=same_text and len(known) > 1 and score == min(known),
            unfinished=not run.finished,
        )
        for run, score in zip(runs, scores, strict=True)
    )
    return Headline(tuple(s for s in sentences if s), cards)


def baseline(runs: Sequence[RunRecord]) -> RunRecord:
    """What the others are compared with: the first plain Transformer, else the first run."""
    plain = [run for run in runs if run.config and not run.routed and run.recursions == 1]
    return (plain or list(runs))[0]


def describe(run: RunRecord) -> str:
    """What kind of model it is, in a few words."""
    if run.config is None:
        return "configuration missing"
    m = run.config.model
    if run.routed:
        return f"Mixture-of-Recursions, R = {m.recursions}, {m.layers} unrolled layers"
    if run.recursions > 1:
        return f"Recursive Transformer, R = {m.recursions}, {m.layers} unrolled layers"
    return f"Transformer, {m.layers} layers"


def _versus(run: RunRecord, base: RunRecord) -> str:
    ours, theirs = tables.bits_per_byte(run), tables.bits_per_byte(base)
    if ours is None or theirs is None:
        return ""
    change = ours / theirs - 1
    word = "better" if change < 0 else "worse"
    verdict = f"{units.percent(abs(change))} {word} than" if abs(change) >= 5e-4 else "on par with"
    budget, with_ = _budget(run, base), _savings(run, base)
    return (
        f"{run.name} reaches {units.fixed(ours)} bits per byte, {verdict} {base.name} ({units.fixed(theirs)})"
        f"{' ' + budget if budget else ''}{', with ' + with_ if with_ else ''}."
    )


def _apart(runs: Sequence[RunRecord], scores: Sequence[float | None]) -> str:
    """The scores of runs that were evaluated on different text."""
    named = [
        f"{run.name} {units.fixed(score)}"
        for run, score in zip(runs, scores, strict=True)
        if score is not None
    ]
    return f"The runs were evaluated on different text, so their scores do not compare: {', '.join(named)} bits per byte."


def _budget(run: RunRecord, base: RunRecord) -> str:
    ours, theirs = tables.paper_training(run), tables.paper_training(base)
    if not ours or not theirs:
        return ""
    if abs(ours / theirs - 1) <= SAME_BUDGET:
        return "at the same training FLOPs (paper accounting)"
    return f"at {units.significant(ours / theirs, 2)} times the training FLOPs (paper accounting)"


def _savings(run: RunRecord, base: RunRecord) -> str:
    named = (
        ("the unique parameters", tables.non_embedding),
        ("the forward FLOPs a token", tables.true_flops),
        ("the KV cache", tables.kv_bytes),
    )
    pairs = [(name, value(run), value(base)) for name, value in named]
    parts = [
        f"{units.significant(a / b, 2)}× {name}"
        for name, a, b in pairs
        if a and b and abs(a / b - 1) > 0.01
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _validation(config: Config) -> tuple[object, ...]:
    """What decides which text a run is evaluated on."""
    data, train = config.data, config.train
    return (
        data.source,
        data.paths,
        data.name,
        data.split,
        data.text_key,
        data.holdout,
        train.eval_rows,
    )


def _floor(runs: Sequence[RunRecord], scores: Sequence[float | None]) -> list[str]:
    """A sentence about the trigram model, if it was measured."""
    floors = [tables.trigram(run) for run in runs]
    pairs = [
        (r.name, s, f)
        for r, s, f in zip(runs, scores, floors, strict=True)
        if s is not None and f is not None
    ]
    if not pairs:
        return []
    floor = " and ".join(dict.fromkeys(units.fixed(f) for _, _, f in pairs))
    losers = [
        f"{name} did not beat a byte trigram model ({units.fixed(f)} bits per byte)"
        for name, s, f in pairs
        if s >= f
    ]
    if losers:
        return [f"Worse than the least to expect: {', '.join(losers)}."]
    if len(pairs) < len(runs):
        subject = (
            f"{', '.join(name for name, _, _ in pairs)} {'beats' if len(pairs) == 1 else 'beat'}"
        )
    else:
        subject = {1: "It beats", 2: "Both beat"}.get(len(pairs), "All beat")
    return [f"{subject} the floor of a byte trigram model ({floor} bits per byte)."]


def _facts(run: RunRecord) -> tuple[str, ...]:
    parameters, depth, speed = (
        tables.non_embedding(run),
        tables.mean_depth(run),
        tables.tokens_per_second(run),
    )
    facts = []
    if parameters is not None:
        facts.append(f"{units.count(parameters)} unique parameters")
    if run.steps:
        planned = (
            accounting.training_steps(run.config) if run.config and not run.finished else run.steps
        )
        of = f" of {planned:,}" if planned > run.steps else ""
        facts.append(f"{run.steps:,}{of} steps, {units.count(tables.tokens(run))} tokens")
    if depth is not None:
        facts.append(f"mean depth {units.fixed(depth, 2)} of {run.recursions}")
    if speed is not None:
        facts.append(units.si(speed, "tokens/s"))
    return tuple(facts)

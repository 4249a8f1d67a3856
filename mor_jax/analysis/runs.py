"""A run directory, read back: configuration, metrics over time, summary.

    config.json     the full configuration, "name" and the resolved vocabulary size included
    metrics.jsonl   one JSON object a line, "kind" is "train" or "eval"
    summary.json    written at the end

A run that is still going, or was killed, has some of these and perhaps half a last line. It is read
as far as it goes, and `notes` says what is missing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from etils import epath

from mor_jax.config import Config, from_dict
from mor_jax.errors import ConfigError, UserError
from mor_jax.paths import as_path


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run. Records are ordered by step, one of a kind for each step."""

    path: epath.Path
    name: str
    config_dict: Mapping[str, Any]  # as written; {} when missing
    config: Config | None  # None when missing or of another version
    train: tuple[Mapping[str, Any], ...]
    evals: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any] | None  # None until the run has ended
    notes: tuple[str, ...] = field(default=())  # one sentence for each thing missing

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a run directory.

        Raises:
          UserError: the directory does not exist or holds neither a configuration nor metrics.
        """
        path = as_path(path)
        if not path.is_dir():
            raise UserError(
                f"{path} is not a directory. Give the directory a training run wrote (its workdir)."
            )
        if not any((path / f).is_file() for f in ("config.json", "metrics.jsonl")):
            raise UserError(
                f"{path} is not a run: it has neither config.json nor metrics.jsonl. Give the directory a training "
                "run wrote (its workdir)."
            )
        notes: list[str] = []
        raw = _read_json(path / "config.json", notes) or {}
        records = _read_lines(path / "metrics.jsonl", notes)
        summary = _read_json(path / "summary.json", [])
        if summary is None:
            notes.append(
                "summary.json is missing: the run has not ended, numbers are of its last records."
            )
        train, evals = (_by_step(records, kind) for kind in ("train", "eval"))
        if summary and not evals and isinstance(summary.get("eval"), Mapping):
            evals = (summary["eval"],)
        if not train:
            notes.append("no training record yet.")
        if not evals:
            notes.append("not evaluated yet.")
        return cls(
            path=path,
            name=str(raw.get("name") or (summary or {}).get("name") or path.name),
            config_dict=raw,
            config=_typed(raw, notes),
            train=train,
            evals=evals,
            summary=summary,
            notes=tuple(notes),
        )

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def steps(self) -> int:
        """Optimiser steps done, as far as recorded."""
        done = [int(r.get("step", 0)) for r in (self.train[-1:] + self.evals[-1:])]
        return max([int((self.summary or {}).get("steps") or 0), *done])

    @property
    def routed(self) -> bool:
        """Whether tokens choose their depth; with a fixed depth, top-k and causal evaluation are
        one thing."""
        return self.config is not None and self.config.depth.routed

    @property
    def recursions(self) -> int:
        return self.config.model.recursions if self.config else 1

    def series(self, key: str, kind: str = "train") -> tuple[list[int], list[float]]:
        """(steps, values) of a metric where it is a finite number."""
        records = self.train if kind == "train" else self.evals
        points = [
            (int(r["step"]), v)
            for r in records
            if "step" in r and (v := number(r.get(key))) is not None
        ]
        return [p[0] for p in points], [p[1] for p in points]

    def last_eval(self, key: str) -> Any:
        """The newest evaluation's value of `key`, or None.

        With a fixed depth, "causal/..." and "topk/..." stand in for each other: nothing is
        selected.
        """
        for record in reversed(self.evals):
            for name in (key, *(() if self.routed else (_twin(key),))):
                if record.get(name) is not None:
                    return record[name]
        return None

    def summarised(self, key: str) -> Any:
        """A field of summary.json, or None."""
        return (self.summary or {}).get(key)


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _twin(key: str) -> str:
    way, _, rest = key.partition("/")
    return {"causal": "topk/", "topk": "causal/"}.get(way, way + "/") + rest


def _by_step(records: list[Mapping[str, Any]], kind: str) -> tuple[Mapping[str, Any], ...]:
    """Records of a kind by step; a resumed run repeats some steps, the later line is the one that
    counts."""
    found = {
        int(r["step"]): r
        for r in records
        if r.get("kind") == kind and number(r.get("step")) is not None
    }
    return tuple(found[step] for step in sorted(found))


def _read_json(path: epath.Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing.")
        return None
    except (OSError, ValueError) as err:
        notes.append(f"{path.name} cannot be read ({err}).")
        return None
    return value if isinstance(value, dict) else None


def _read_lines(path: epath.Path, notes: list[str]) -> list[Mapping[str, Any]]:
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        notes.append(f"{path.name} is missing.")
        return []
    records: list[Mapping[str, Any]] = []
    broken = 0
    for i, line in enumerate(lines):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            # Half a last line is what a killed writer leaves behind, and no cause for alarm.
            broken += i < len(lines) - 1
            continue
        if isinstance(record, dict):
            records.append(record)
    if broken:
        notes.append(f"{path.name} has {broken} unreadable line{'s' * (broken > 1)}, skipped.")
    return records


def _typed(raw: Mapping[str, Any], notes: list[str]) -> Config | None:
    if not raw:
        return None
    try:
        return from_dict(raw)
    except ConfigError as err:
        notes.append(f"config.json is of another version ({err})")
        return None

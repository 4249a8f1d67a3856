"""Does one setting beat another? A published ordering held against our own runs, seed by seed.

Runs of the same seed read the same rows in the same order, so two settings are compared within a
seed and the differences are what is averaged: what a seed does to both of them cancels. The
interval is Student's t of the paired differences, two-sided; with few seeds it is wide, and says
so. Every contrast is judged on its own: among many, one in twenty is expected to look clear by
chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95  # of the interval

AGREES, DISAGREES, OPEN = "agrees", "does not agree", "no claim"


@dataclass(frozen=True)
class Contrast:
    """Two settings, the published better one first, and by how much it was better (nats a token,
    not negative)."""

    better: str
    worse: str
    paper: float
    source: str  # where the paper says so, and at which scale


@dataclass(frozen=True)
class Paired:
    """Differences `worse - better` over the seeds that both have: positive where the ordering is
    the published one."""

    seeds: tuple[int, ...]
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of a difference; None for fewer than two seeds."""
        return statistics.stdev(self.differences) if len(self.differences) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bounds of the mean difference at LEVEL; None for fewer than two seeds."""
        n, deviation = len(self.differences), self.deviation
        if deviation is None:
            return None
        half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * deviation / math.sqrt(n)
        return self.mean - half, self.mean + half

    @property
    def verdict(self) -> str:
        """AGREES, DISAGREES, or OPEN where the interval holds both signs (or there is none)."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return OPEN
        return AGREES if self.mean > 0 else DISAGREES


def paired(better: Mapping[int, float], worse: Mapping[int, float]) -> Paired | None:
    """The differences of two settings, each a value by seed; None when no seed has both."""
    seeds = tuple(s for s in sorted(better) if s in worse)
    return Paired(seeds, tuple(worse[s] - better[s] for s in seeds)) if seeds else None


def sentence(contrast: Contrast, found: Paired | None) -> str:
    """What our runs allow to be said of a published ordering, in one plain sentence."""
    claim = f"{contrast.better} below {contrast.worse} (paper: by {contrast.paper:.3f}, {contrast.source})"
    if found is None:
        return f"{claim}: not measured yet."
    if found.interval is None:
        return f"{claim}: {found.mean:+.3f} with one seed, which allows no claim."
    n, (low, high) = len(found.seeds), found.interval
    measured = f"{found.mean:+.3f} over {n} seeds, {LEVEL:.0%} interval {low:+.3f} to {high:+.3f}"
    meaning = {
        AGREES: "our runs agree",
        DISAGREES: "our runs show the opposite",
        OPEN: "the spread over seeds does not allow a claim",
    }
    return f"{claim}: {measured}; {meaning[found.verdict]}."


def judge(
    contrasts: Sequence[Contrast], values: Mapping[str, Mapping[int, float]]
) -> list[tuple[Contrast, Paired | None]]:
    """Each contrast with what was measured. `values`: setting: {seed: metric}, lower is better."""
    return [(c, paired(values.get(c.better, {}), values.get(c.worse, {}))) for c in contrasts]

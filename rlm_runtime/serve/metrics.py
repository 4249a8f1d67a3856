"""Counters, gauges and histograms in Prometheus' text format; names follow the usual ones of model servers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Written from the event loop only."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        self._histograms: dict[str, dict[tuple[tuple[str, str], ...], list[float]]] = {}  # buckets, then count, sum
        self._bounds: dict[str, Sequence[float]] = {}
        self._help: dict[str, str] = {}

    def counter(self, name: str, text: str) -> None:
        self._help[name] = text
        self._counters[name] = {}

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._help[name] = text
        self._gauges[name] = read

    def histogram(self, name: str, text: str, bounds: Sequence[float] = SECONDS) -> None:
        self._help[name] = text
        self._bounds[name] = bounds
        self._histograms[name] = {}

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        series = self._counters[name]
        series[key] = series.get(key, 0.0) + amount

    def observe(self, name: str, value: float, times: int = 1, **labels: str) -> None:
        bounds, key = self._bounds[name], tuple(sorted(labels.items()))
        row = self._histograms[name].setdefault(key, [0.0] * (len(bounds) + 3))
        row[bisect_left(bounds, value)] += times
        row[-2] += times
        row[-1] += value * times

    def value(self, name: str, **labels: str) -> float:
        """One series, or with no labels the sum of all of a counter; for tests."""
        if name in self._gauges:
            return self._gauges[name]()
        if name in self._histograms:
            return sum(row[-2] for key, row in self._histograms[name].items() if not labels or dict(key) == labels)
        series = self._counters[name]
        return series.get(tuple(sorted(labels.items())), 0.0) if labels else sum(series.values())

    def text(self) -> str:
        lines: list[str] = []
        for name, series in self._counters.items():
            lines += [f"# HELP {name} {self._help[name]}", f"# TYPE {name} counter"]
            lines += [f"{name}{labels_text(key)} {value:.15g}" for key, value in series.items()] or [f"{name} 0"]
        for name, read in self._gauges.items():
            lines += [f"# HELP {name} {self._help[name]}", f"# TYPE {name} gauge", f"{name} {read():.15g}"]
        for name, rows in self._histograms.items():
            bounds = self._bounds[name]
            lines += [f"# HELP {name} {self._help[name]}", f"# TYPE {name} histogram"]
            for key, row in (rows or {(): [0.0] * (len(bounds) + 3)}).items():
                total = 0.0
                for bound, count in zip((*map(str, bounds), "+Inf"), row, strict=False):
                    total += count
                    lines.append(f"{name}_bucket{labels_text((*key, ('le', bound)))} {total:.15g}")
                lines += [
                    f"{name}_sum{labels_text(key)} {row[-1]:.6f}",
                    f"{name}_count{labels_text(key)} {row[-2]:.15g}",
                ]
        return "\n".join(lines) + "\n"


def labels_text(key: tuple[tuple[str, str], ...]) -> str:
    if not key:
        return ""
    escaped = ((k, v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for k, v in key)
    return "{" + ",".join(f'{k}="{v}"' for k, v in escaped) + "}"


def standard() -> Metrics:
    metrics = Metrics()
    metrics.counter("rlm_http_requests_total", "HTTP requests answered, by route and status.")
    metrics.counter("rlm_requests_total", "Runs ended, by outcome.")
    metrics.counter("rlm_rejected_total", "Runs refused before they began, by reason.")
    metrics.counter("rlm_disconnects_total", "Runs cancelled because the client went away.")
    metrics.counter("rlm_prompt_tokens_total", "Prompt tokens over the whole trees of all runs.")
    metrics.counter("rlm_generation_tokens_total", "Generated tokens over the whole trees of all runs.")
    metrics.counter("rlm_model_calls_total", "Model calls over the whole trees of all runs.")
    metrics.counter("rlm_cost_usd_total", "Dollars spent, where prices are known.")
    metrics.histogram("rlm_e2e_request_latency_seconds", "From admission to the end of a run.")
    metrics.histogram("rlm_request_queue_time_seconds", "Waiting for a free place.")
    return metrics

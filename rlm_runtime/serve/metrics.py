"""Counters, gauges and histograms in Prometheus' text format; names follow the usual ones of model servers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Written from the event loop only."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        self._histograms: dict[str, list[float]] = {}  # one count for each bucket, then count, sum
        self._help: dict[str, str] = {}

    def counter(self, name: str, text: str) -> None:
        self._help[name] = text
        self._counters[name] = {}

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._help[name] = text
        self._gauges[name] = read

    def histogram(self, name: str, text: str) -> None:
        self._help[name] = text
        self._histograms[name] = [0.0] * (len(SECONDS) + 3)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        series = self._counters[name]
        series[key] = series.get(key, 0.0) + amount

    def observe(self, name: str, value: float) -> None:
        row = self._histograms[name]
        row[bisect_left(SECONDS, value)] += 1
        row[-2] += 1
        row[-1] += value

    def value(self, name: str, **labels: str) -> float:
        """One series, or with no labels the sum of all of a counter; for tests."""
        if name in self._gauges:
            return self._gauges[name]()
        if name in self._histograms:
            return self._histograms[name][-2]
        series = self._counters[name]
        return series.get(tuple(sorted(labels.items())), 0.0) if labels else sum(series.values())

    def text(self) -> str:
        lines: list[str] = []
        for name, series in self._counters.items():
            lines += [f"# HELP {name} {self._help[name]}", f"# TYPE {name} counter"]
            lines += [f"{name}{_labels(key)} {value:g}" for key, value in series.items()] or [f"{name} 0"]
        for name, read in self._gauges.items():
            lines += [f"# HELP {name} {self._help[name]}", f"# TYPE {name} gauge", f"{name} {read():g}"]
        for name, row in self._histograms.items():
            lines += [f"# HELP {name} {self._help[name]}", f"# TYPE {name} histogram"]
            total = 0.0
            for bound, count in zip((*map(str, SECONDS), "+Inf"), row, strict=False):
                total += count
                lines.append(f'{name}_bucket{{le="{bound}"}} {total:g}')
            lines += [f"{name}_sum {row[-1]:.6f}", f"{name}_count {row[-2]:g}"]
        return "\n".join(lines) + "\n"


def _labels(key: tuple[tuple[str, str], ...]) -> str:
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

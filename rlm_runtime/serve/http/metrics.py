"""Counters, gauges and histograms for Prometheus; names follow the usual ones of model servers."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Histogram(Collector):
    """A histogram that takes a value many times at once: the mean time between tokens counts once a
    token, and the library's own would have to be told of each."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]
    ) -> None:
        self._name, self._text, self._labels, self._bounds = (
            name,
            text,
            labels,
            (*bounds, float("inf")),
        )
        # counts of the buckets; [sum]
        self._series: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        if not labels:
            self._of(())

    def observe(self, value: float, times: int, labels: dict[str, str]) -> None:
        counts, total = self._of(tuple(labels[name] for name in self._labels))
        counts[bisect_left(self._bounds, value)] += times
        total[0] += value * times

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for key, (counts, total) in self._series.items():
            sums = zip(
                map(floatToGoString, self._bounds), itertools.accumulate(counts), strict=True
            )
            family.add_metric(key, list(sums), total[0])
        yield family

    def _of(self, key: tuple[str, ...]) -> tuple[list[int], list[float]]:
        return self._series.setdefault(key, ([0] * len(self._bounds), [0.0]))


class Metrics(Collector):
    """The metrics of one server, by name, in a registry of their own. Written from the event loop
    only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._all: dict[str, Counter | Gauge | Histogram] = {}

    def counter(self, name: str, text: str, *labels: str) -> None:
        self._all[name] = self._counters[name] = Counter(name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        gauge = self._all[name] = Gauge(name, text, registry=self.registry)
        gauge.set_function(read)

    def histogram(
        self, name: str, text: str, *labels: str, bounds: Sequence[float] = SECONDS
    ) -> None:
        self._all[name] = self._histograms[name] = Histogram(name, text, labels, bounds)
        self.registry.register(self._histograms[name])

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def observe(self, name: str, value: float, times: int = 1, **labels: str) -> None:
        """That `value` was measured, `times` times."""
        self._histograms[name].observe(value, times, labels)

    def value(self, name: str, **labels: str) -> float:
        """The sum over the series with these labels; of a histogram, how much was observed."""
        (metric,) = self._all[name].collect()
        suffix = (
            "_count" if metric.type == "histogram" else "_total" if metric.type == "counter" else ""
        )
        wanted = metric.name + suffix
        return sum(
            s.value
            for s in metric.samples
            if s.name == wanted and labels.items() <= s.labels.items()
        )

    def collect(self) -> Iterator[Metric]:
        """All metrics without the times at which their series began, which nobody here asked
        for."""
        for metric in self.registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric

    def text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self).decode()

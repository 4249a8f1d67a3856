"""Counters, gauges and histograms for Prometheus; names follow the usual ones of model servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics(Collector):
    """The metrics of one server, by name, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}

    def counter(self, name: str, text: str, *labels: str) -> None:
        self._metrics[name] = Counter(name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        gauge = self._metrics[name] = Gauge(name, text, registry=self.registry)
        gauge.set_function(read)

    def histogram(self, name: str, text: str, *labels: str, bounds: Sequence[float] = SECONDS) -> None:
        self._metrics[name] = Histogram(name, text, labels, registry=self.registry, buckets=bounds)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        counter = self._metrics[name]
        assert isinstance(counter, Counter)
        (counter.labels(**labels) if labels else counter).inc(amount)

    def observe(self, name: str, value: float, times: int = 1, **labels: str) -> None:
        histogram = self._metrics[name]
        assert isinstance(histogram, Histogram)
        series = histogram.labels(**labels) if labels else histogram
        for _ in range(times):
            series.observe(value)

    def value(self, name: str, **labels: str) -> float:
        """The sum over the series with these labels; of a histogram, how much was observed."""
        (metric,) = self._metrics[name].collect()
        suffix = "_count" if metric.type == "histogram" else "_total" if metric.type == "counter" else ""
        wanted = metric.name + suffix
        return sum(s.value for s in metric.samples if s.name == wanted and labels.items() <= s.labels.items())

    def collect(self) -> Iterator[Metric]:
        """All metrics without the times at which their series began, which nobody here asked for."""
        for metric in self.registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric

    def text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self).decode()

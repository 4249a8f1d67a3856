"""Metrics as Prometheus reads them."""

import prometheus_client as library
from hypothesis import given
from hypothesis import strategies as st

from rlm_runtime.serve.http.metrics import Metrics

BOUNDS = (0.5, 1, 2, 8)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 40).map(lambda n: n / 4), st.integers(1, 5))
    )
)
def test_a_value_many_times_is_that_many_values(observed):
    """Held to the library's own histogram, which is told of each. Quarters add up exactly."""
    ours, registry = Metrics(), library.CollectorRegistry()
    ours.histogram("seconds", "Help.", "model", bounds=BOUNDS)
    theirs = library.Histogram("seconds", "Help.", ["model"], buckets=BOUNDS, registry=registry)
    for model, value, times in observed:
        ours.observe("seconds", value, times, model=model)
        for _ in range(times):
            theirs.labels(model=model).observe(value)
    lines = library.generate_latest(registry).decode().splitlines()
    assert ours.text().splitlines() == [line for line in lines if "_created" not in line]
    assert ours.value("seconds", model="a") == sum(
        times for model, _, times in observed if model == "a"
    )


def test_series_are_summed_over_the_labels_that_are_not_given():
    metrics = Metrics()
    metrics.counter("done_total", "Help.", "route", "status")
    metrics.counter("lost_total", "Help.")
    metrics.gauge("running", "Help.", lambda: 3)
    for route, status in (("a", "200"), ("a", "404"), ("b", "200")):
        metrics.add("done_total", route=route, status=status)
    assert metrics.value("done_total") == 3 and metrics.value("done_total", route="a") == 2
    assert metrics.value("lost_total") == 0 and metrics.value("running") == 3
    assert "lost_total 0.0" in metrics.text() and "running 3.0" in metrics.text()

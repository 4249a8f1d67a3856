"""Prometheus metrics of a model server: vLLM's names where it has one, so that its dashboards fit,
else `mor_jax:`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from rlm_runtime.serve.http.metrics import Metrics
from rlm_runtime.serve.model.backend import ModelBackend

SHORT = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
    600,
)
DEPTHS = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16)

# Of the engine's `stats()`, those that vLLM has too. All others get the prefix `mor_jax:`.
SHARED = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
)

# Not shown: the engine's own count of what is measured here, at the side of the client.
OWN = (
    "prompt_tokens_total",
    "generation_",
    "time_to_first_token_",
    "request_queue_time_",
    "e2e_request_",
    "recursion_depth_",
    "requests_",
)

HELP = {
    "num_requests_running": "Sequences that have a lane.",
    "num_requests_waiting": "Sequences that wait for a lane.",
    "kv_cache_usage_perc": "Share of the key-value memory in use, 0 to 1.",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Prompt tokens found there.",
    "num_preemptions_total": "Sequences that gave their memory up and were computed again.",
    "spec_decode_num_draft_tokens_total": "Tokens drafted with few recursions.",
    "spec_decode_num_accepted_tokens_total": "Those of them that verification drew, too.",
    "prefix_cache_bytes": "Bytes of keys and values kept for prompts that share a head.",
    "prefix_cache_usage_perc": "Share of the prefix cache in use, 0 to 1.",
    "held_back_total": "Sequences that waited for another to compute the head of their prompt.",
    "prefill_tokens_total": "Prompt tokens that were computed, again after a preemption.",
    "lane_occupancy": "Share of the lanes that are busy, 0 to 1.",
    "ticks_total": "Rounds of core passes and a boundary.",
    "core_passes_total": "Applications of the shared core to all lanes.",
    "core_rows_total": "Lanes that took part in them.",
    "boundary_rows": "Lanes that drew a token at the newest boundary.",
    "boundary_rows_total": "Lanes whose token left at a boundary, of all of them.",
    "lost_listeners_total": "Requests whose listener failed.",
    "compilations_total": "Programs compiled since warm-up; it must stay at 0.",
    "mean_depth": "Mean recursions of a token.",
}


class ModelMetrics(Metrics):
    """`models` gives what is served now, with `.name` and `.service.stats()`; it is read when the
    metrics are."""

    def __init__(self, models: Callable[[], Iterable[ModelBackend]]) -> None:
        super().__init__()
        self._models = models
        self.counter(
            "mor_jax:http_requests_total",
            "HTTP requests answered, by route and status.",
            "route",
            "status",
        )
        self.counter(
            "mor_jax:rejected_total", "Requests refused before they ran, by reason.", "reason"
        )
        self.counter(
            "mor_jax:disconnects_total", "Requests cancelled because the client went away."
        )
        model, ended = "model_name", "finished_reason"
        self.counter(
            "mor_jax:stuck_sequences_total",
            "Sequences the engine did not end when it was told to.",
            model,
        )
        self.counter("vllm:prompt_tokens_total", "Prompt tokens of ended sequences.", model)
        self.counter("vllm:generation_tokens_total", "Drawn tokens of ended sequences.", model)
        self.counter(
            "vllm:request_success_total",
            "Sequences that ended as they should, by reason.",
            model,
            ended,
        )
        text = "Sequences that were cancelled, late or given up, by reason."
        self.counter("mor_jax:request_failure_total", text, model, ended)
        self.counter(
            "mor_jax:good_requests_total",
            "Sequences within the goals of first token and token time.",
            model,
        )
        for name, text in {
            "time_to_first_token": "From the request to its first token.",
            "inter_token_latency": "Mean time between a sequence's tokens, once a token.",
            "e2e_request_latency": "From the request to the end of a sequence.",
            "request_queue_time": "From submission to the first prefill.",
        }.items():
            self.histogram(f"vllm:{name}_seconds", text, model, bounds=SHORT)
        self.histogram(
            "mor_jax:recursion_depth", "Recursions of drawn tokens.", model, bounds=DEPTHS
        )

    def collect(self) -> Iterator[Metric]:
        yield from super().collect()
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for model in self._models():
            for key, value in model.service.stats().items():
                if key.startswith(OWN):
                    continue
                name = ("vllm:" if key in SHARED else "mor_jax:") + key
                if name not in families:
                    family = CounterMetricFamily if key.endswith("_total") else GaugeMetricFamily
                    families[name] = family(
                        name, HELP.get(key, key.replace("_", " ")), labels=["model_name"]
                    )
                families[name].add_metric([model.name], value)
        yield from families.values()

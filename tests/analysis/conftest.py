"""Made-up runs that look like real ones: a plain Transformer and a Mixture-of-Recursions model of
the same budget."""

import json
import math
import random

import pytest

from mor_jax.analysis import accounting
from mor_jax.config import Config, DepthConfig, ModelConfig, TrainConfig

SHAPE = dict(layers=8, width=256, heads=4, kv_heads=2, mlp_width=704, vocab_size=2048, context=256)


def write_run(
    folder, name, *, recursions=1, points=60, gain=0.0, budget=2e15, finished=True, seed=0
):
    """Write a run directory and return its path."""
    rng = random.Random(seed)
    routed = recursions > 1
    cfg = Config(
        name=name,
        model=ModelConfig(
            **SHAPE, recursions=recursions, sharing="middle_cycle" if routed else "none"
        ),
        depth=DepthConfig(policy="expert_choice" if routed else "fixed"),
        train=TrainConfig(flops=budget, batch_size=32),
    )
    steps = accounting.training_steps(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg.to_dict()))
    records, speed = [], 52_000 if routed else 41_000
    tokens = accounting.tokens_per_step(cfg)
    for i in range(1, points + 1):
        step = i * steps // points
        done = step / steps
        loss = 2.35 - gain + 5.2 * math.exp(-9 * done) + 0.6 * (1 - done) + rng.gauss(0, 0.05)
        train = dict(
            kind="train",
            step=step,
            time_s=step * tokens / speed,
            tokens=step * tokens,
            loss=loss,
            lm_loss=loss,
            router_loss=0.002,
            bits_per_byte=loss / math.log(2) / 3.1,
            lr=3e-3,
            grad_norm=0.6,
            update_norm=0.1,
            tokens_per_s=speed * rng.uniform(0.96, 1.03) if i > 1 else speed / 9,
            flops_per_s=1e12,
            mfu=None,
            mean_depth=(recursions + 1) / 2 if routed else 1.0,
        )
        for r in range(1, recursions + 1) if routed else ():
            train[f"router/{r}/sampling_accuracy"] = 1 - (
                0 if r == 1 else 0.45 * math.exp(-6 * done) + 0.01 * r
            )
            train[f"router/{r}/score_mean"] = 0.5 + (0.98 - 0.33 * (r - 1) - 0.5) * (
                1 - math.exp(-8 * done)
            )
            train[f"router/{r}/score_std"] = 0.05 + (
                0.3 * (1 - math.exp(-5 * done)) if r > 1 else 0
            )
            train[f"router/{r}/selected"] = (recursions - r + 1) / recursions
            train[f"router/{r}/histogram"] = [0.0] * 9 + [1 - done, 0.0] + [done / 9] * 9
        records.append(train)
        if i % 10 == 0:
            nll = 2.42 - gain + 5.2 * math.exp(-9 * done) + 0.6 * (1 - done)
            causal = nll + (0.03 + 0.4 * math.exp(-6 * done) if routed else 0)
            evaluation = {
                "kind": "eval",
                "step": step,
                "topk/nll": nll,
                "topk/bits_per_byte": nll / math.log(2) / 3.1,
                "causal/nll": causal,
                "causal/bits_per_byte": causal / math.log(2) / 3.1,
            }
            if routed:
                share = [0.01, 0.35 - 0.2 * (1 - done), 0.32, 0.32 + 0.2 * (1 - done)]
                active = [sum(share[r:]) for r in range(1, 4)]
                evaluation |= {
                    "topk/mean_depth": 2.0,
                    "causal/mean_depth": sum(active),
                    "sampling_accuracy": 0.97,
                    "dead_token_ratio": 0.002,
                    "causal/depth_share": share,
                    "causal/active_share": active,
                    "causal/depth_nll": [causal + 0.1 * d for d in range(4)],
                }
            records.append(evaluation)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if finished:
        summary = {
            "name": name,
            "steps": steps,
            "seconds": steps * tokens / speed,
            "tokens": steps * tokens,
            "parameters": accounting.parameters(cfg.model, cfg.depth).to_dict(),
            "tokens_per_s": speed,
            "eval": records[-1],
            "trigram_bits_per_byte": 1.46,
            "device": "cpu, 2 cores",
            "versions": {"python": "3.11", "jax": "0.10.2", "mor_jax": "0.1.0"},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="session")
def run_dirs(tmp_path_factory):
    """(vanilla, mor3) directories; read only."""
    folder = tmp_path_factory.mktemp("runs")
    vanilla = write_run(folder / "vanilla", "vanilla")
    return vanilla, write_run(folder / "mor3", "mor3", recursions=3, gain=0.06, seed=1)


@pytest.fixture(scope="session")
def make_run():
    """`write_run`, for tests that need another run."""
    return write_run

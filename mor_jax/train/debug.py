"""Looking inside a run: traces, the compiled step's text and memory, NaN hunting, and the step
without XLA's help."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mor_jax.errors import ConfigError
from mor_jax.train.step import Program

MEMORY = ("argument", "output", "alias", "temp", "generated_code")  # sizes XLA tells of a program


@dataclasses.dataclass(frozen=True)
class Debug:
    """Switches of one start; none of them changes what is computed, but for rounding.

    profile_steps: (first, last) step, both included, whose trace goes to <workdir>/profile
    (TensorBoard, Perfetto).
    nans: stop at the operation that first makes a NaN, with its line; slower.
    scan: False unrolls every `lax.scan`, so that a trace or an error names the recursion step.
    jit: False runs operation by operation, so that a debugger or `print` sees every array; very
    slow, one process.
    """

    profile_steps: tuple[int, int] | None = None
    nans: bool = False
    scan: bool = True
    jit: bool = True

    @classmethod
    def parse(
        cls,
        profile_steps: list[str] | None,
        *,
        nans: bool = False,
        scan: bool = True,
        jit: bool = True,
    ) -> Debug:
        """From the flags of a command. Raises ConfigError."""
        if not profile_steps:
            return cls(None, nans, scan, jit)
        given = ",".join(profile_steps)
        try:
            first, last = map(int, profile_steps)
        except ValueError:
            first, last = 0, 0
        if not 1 <= first <= last:
            raise ConfigError(
                f"--profile_steps={given} must be two whole numbers, the first and the last step to trace, counted "
                "from 1, e.g. 20,22."
            )
        return cls((first, last), nans, scan, jit)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Applies the switches inside this context."""
        if not self.jit and jax.process_count() > 1:
            raise ConfigError(
                "--no_jit runs on one process only: without compilation nothing joins several."
            )
        with contextlib.ExitStack() as stack:
            if self.nans:
                stack.enter_context(jax.debug_nans(True))
            if not self.jit:
                stack.enter_context(jax.disable_jit())
            elif not self.scan:
                # XLA sees a loop of one iteration as its body. Only callers of `jax.lax.scan` by
                # that name, which is all of ours, are changed.
                plain = jax.lax.scan
                jax.lax.scan = functools.partial(plain, unroll=True)
                stack.callback(setattr, jax.lax, "scan", plain)
            yield


class Tracer:
    """Starts and stops the profiler around the chosen steps."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps, self._directory, self._on = steps, directory, False
        if jax.process_count() > 1:  # hosts of one name would write over each other
            self._directory = directory / f"process_{jax.process_index()}"

    def before(self, step: int) -> None:
        """Call before `step` is dispatched."""
        if self._steps and not self._on and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._directory))
            self._on = True

    def after(self, step: int, result: Any) -> Path | None:
        """Call after; `result`: arrays of the step. The directory, once a trace has been
        written."""
        if not self._on or (self._steps and step < self._steps[1]):
            return None
        jax.block_until_ready(result)
        return self.close()

    def close(self) -> Path | None:
        """Write what there is, should the run end in the middle."""
        if not self._on:
            return None
        self._on, self._steps = False, None
        jax.profiler.stop_trace()
        return self._directory


def compile_step(
    step: Program, arguments: tuple[Any, ...], debug: Debug, directory: Path | None
) -> tuple[Program, str]:
    """(program, how long that took): `step` compiled for `arguments`, the first donated; its
    summary in `directory`.

    `directory` (None on all hosts but one) receives train_step.hlo.txt.gz, the optimised program,
    and memory.json: bytes a device for arguments, outputs, the part of them that shares memory,
    intermediate results, and code.
    """
    if not debug.jit:
        return step, "not compiled"
    if debug.nans:
        # To find the operation JAX runs the step once more, one by one: its arguments must still be
        # there.
        return jax.jit(step), "compiled at the first call, to look for NaNs"
    begin = time.perf_counter()
    hits: list[str] = []

    def listen(event: str, **_: str | int) -> None:
        if event.endswith("compilation_cache/cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
        traced = time.perf_counter()
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    end = time.perf_counter()
    if directory is not None:
        with contextlib.suppress(OSError):
            _summarize(compiled, directory)
    where = "read from the cache" if hits else "compiled"
    return compiled, f"traced in {traced - begin:.1f} s, {where} in {end - traced:.1f} s"


def _summarize(compiled: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with gzip.open(
        directory / "train_step.hlo.txt.gz", "wt", encoding="utf-8", compresslevel=1
    ) as f:
        f.write(compiled.as_text())
    found = compiled.memory_analysis()
    if found is not None:
        sizes = {f"{name}_bytes": int(getattr(found, f"{name}_size_in_bytes")) for name in MEMORY}
        (directory / "memory.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")

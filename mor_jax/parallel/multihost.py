"""The processes of one job: barriers, heartbeats, and an orderly end of all when one fails.

It uses the key-value store of JAX's coordination service, which `jax.distributed` starts. Each
process writes a heartbeat there; process 0 reads all of them and, when one falls silent or a
process reports an error of its own, writes the *verdict*, a sentence with the name of the process.
Everyone who reads it prints it and leaves with status LOST. So a lost host costs `timeout` seconds
and is named, where a collective would wait without end and JAX's own heartbeat would abort without
the name of the lost process.

Process 0 is watched too: where its store does not answer, it is the one that is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from mor_jax.errors import UserError

# exit status of a process that ends because of another one: EX_TEMPFAIL, "run the same command
# again"
LOST = 75
_KEY = "mor_jax"


class Hosts:
    """This process and the others of its job. A single process is a job of one, and all calls
    return at once.

    Attributes: rank, count, names (by rank), and `advice`, a sentence for the message of a loss:
    what to do about it.

    Args:
      client: of JAX's coordination service.
      timeout: seconds without a heartbeat after which a process counts as lost.
      coordinator: host:port of the service, in process 0.
    """

    def __init__(
        self,
        client: Any = None,
        rank: int = 0,
        count: int = 1,
        timeout: float = 60.0,
        coordinator: str = "",
    ):
        self.rank, self.count, self.timeout = rank, count, timeout
        self._coordinator = coordinator
        self.names, self.advice = [process_name()], ""
        self._client = client
        self._closing = threading.Event()
        self._uses: dict[tuple[str, str], int] = {}
        if count == 1:
            return
        self._period = min(1.0, timeout / 6)
        self._state: dict[str, Any] = {"phase": "starting", "step": 0}
        self._suspect = False  # a collective failed here: someone is gone, so silence counts sooner
        self._answered = time.monotonic()  # when the store last did
        self._beats: dict[int, tuple[str, float]] = {}  # rank: last heartbeat and when it changed
        self._set(f"name/{rank}", self.names[0])
        client.wait_at_barrier(f"{_KEY}/names", int(timeout * 5000))
        self.names = self._by_rank("name")
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=f"hosts{work.__name__}", daemon=True).start()

    def describe(self, rank: int) -> str:
        """For example "process 3 (node-17, pid 4711)"."""
        return f"process {rank} ({self.names[rank]})"

    def report(self, **state: Any) -> None:
        """Publishes what this process is doing: `phase`, `step`, and numbers for process 0 (see
        `reports`)."""
        if self.count > 1:
            self._state = self._state | state

    def reports(self) -> list[dict[str, Any]]:
        """The last `report` of every process, by rank; on process 0 alone, empty elsewhere."""
        if self.count == 1 or self.rank != 0:
            return []
        return [_read(self._beats.get(r, ("", 0.0))[0]) for r in range(self.count)]

    def barrier(self, name: str, timeout: float = 1800.0) -> None:
        """Wait until every process calls this with the same `name`, as often as the others.

        Raises:
          UserError: some did not come within `timeout` seconds; the message names them and what
            each was doing.
        """
        if self.count == 1:
            return
        key = self._key("at", name)
        self._set(f"{key}/{self.rank}", "here")
        try:
            self._client.wait_at_barrier(f"{_KEY}/{key}", int(timeout * 1000))
        except Exception as e:
            arrived = self._dir(key)
            missing = [r for r in range(self.count) if r not in arrived]
            if not missing:
                raise
            beats = self._dir("beat")

            def doing(r: int) -> str:
                return _read(beats.get(r, "")).get("phase", "unknown")

            who = ", ".join(f"{self.describe(r)}, last known: {doing(r)}" for r in missing)
            raise UserError(
                f"{timeout:g} s at the meeting point {name!r} and these did not come: {who}."
            ) from e

    def assert_equal(self, what: str, value: str, todo: str) -> None:
        """Check that `value` of every process equals that of process 0.

        Raises:
          UserError: they differ; the message names `what`, the processes, and `todo`.
        """
        if self.count == 1:
            return
        key = self._key("equal", what)
        self._set(f"{key}/{self.rank}", value)
        self.barrier(f"compare {what}")
        values = self._by_rank(key)
        other = [self.describe(r) for r in range(self.count) if values[r] != values[0]]
        if other:
            error = UserError(
                f"{what} of {', '.join(other)} is not that of {self.describe(0)}. {todo}"
            )
            error.everywhere = True
            raise error

    def stop_at(self, tick: int) -> bool:
        """Whether all processes stop here, after a SIGTERM to any of them; call it with growing
        `tick`, all alike.

        XLA's preemption service finds the first tick that no process has passed yet.
        """
        from jax.experimental import multihost_utils

        return self.count > 1 and multihost_utils.reached_preemption_sync_point(tick)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An error inside this context ends all processes of the job; the message names the process
        that failed.

        Errors that all processes raise alike carry `everywhere = True` and are left to pass.
        """
        try:
            yield
        except BaseException as e:
            if self.count == 1 or isinstance(e, SystemExit) or getattr(e, "everywhere", False):
                raise
            if not _own(e):
                # most often a collective that lost its other end: the watch will know
                self._suspect = True
                if self._closing.wait(self.timeout + 3 * self._period):
                    time.sleep(60)  # the watch has the verdict and is ending this process
            text = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {str(e)[:200]}"
            self._publish(f"{self.describe(self.rank)} stopped: {text}")
            if isinstance(e, UserError):
                print(f"error: {text}", file=sys.stderr)
            else:
                traceback.print_exc()
            self.leave(2 if isinstance(e, UserError) else 1)

    def leave(self, status: int, *, farewell: bool = True) -> NoReturn:
        """Ends this process at once. (`sys.exit` would wait in JAX for processes that are gone.)

        farewell: report the end to process 0, which waits until the others have read the verdict
        from it.
        """
        if self.count == 1:
            sys.exit(status)
        self._closing.set()
        if farewell:
            # calls to a store that is gone may hang
            saying = threading.Thread(target=self._farewell, daemon=True)
            saying.start()
            saying.join(5.0 if self.rank == 0 else 1.0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _farewell(self) -> None:
        with contextlib.suppress(Exception):
            self._set(f"read/{self.rank}", "")
            while self.rank == 0 and len(self._dir("read")) < self.count:
                time.sleep(0.1)

    def close(self) -> None:
        """Stops the heartbeats, at the end of a job without errors."""
        if self.count > 1 and not self._closing.is_set():
            self._closing.set()
            with contextlib.suppress(Exception):
                self._set(f"beat/{self.rank}", "")

    def _key(self, kind: str, name: str) -> str:
        """A key for this use of a name; the service accepts each key once."""
        self._uses[kind, name] = self._uses.get((kind, name), 0) + 1
        return f"{kind}/{name}/{self._uses[kind, name]}"

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{_KEY}/{key}", value, allow_overwrite=True)

    def _dir(self, key: str) -> dict[int, str]:
        """{rank: value} of the keys `key`/<rank>."""
        return {
            int(k.rsplit("/", 1)[1]): v for k, v in self._client.key_value_dir_get(f"{_KEY}/{key}/")
        }

    def _by_rank(self, key: str) -> list[str]:
        found = self._dir(key)
        return [found[r] for r in range(self.count)]

    def _publish(self, verdict: str) -> None:
        with contextlib.suppress(Exception):  # the first one stands
            self._client.key_value_set(f"{_KEY}/verdict/0", verdict)

    def _beat(self) -> None:
        """Sends heartbeats and reads the verdict; process 0 also reads all heartbeats."""
        number = 0
        while not self._closing.wait(self._period):
            number += 1
            try:
                self._set(f"beat/{self.rank}", json.dumps({"beat": number, **self._state}))
                if self.rank == 0:
                    self._listen(self._dir("beat"))
                verdict = self._dir("verdict").get(0)
                self._answered = time.monotonic()
            except Exception:
                continue  # the other watch knows what that means
            if verdict:
                self._end(verdict)

    def _listen(self, beats: dict[int, str]) -> None:
        now = time.monotonic()
        for rank, beat in beats.items():
            # an empty one: it has left in order
            if self._beats.get(rank, ("", 0.0))[0] != beat or not beat:
                self._beats[rank] = (beat, now)
        limit = min(self.timeout, 10.0) if self._suspect else self.timeout
        silent = {
            r: _read(beat)
            for r, (beat, since) in self._beats.items()
            if now - since > limit and r != self.rank
        }
        if silent:
            last = (
                f"{self.describe(r)}, last at step {s.get('step')} ({s.get('phase')})"
                for r, s in silent.items()
            )
            self._publish(f"no heartbeat for {limit:g} s from {'; '.join(last)}")

    def _watch(self) -> None:
        """For a store that does not answer: calls to it hang. Where its port refuses, process 0 is
        gone; where it does not even refuse, the process is stopped, or its network is gone, and it
        has the usual time."""
        while not self._closing.wait(0.25):
            late = time.monotonic() - self._answered
            if late > self.timeout + 2 * self._period:
                self._end(
                    f"no answer for {self.timeout:g} s from {self.describe(0)}, at which the others meet"
                )
            elif late > self._period + 1 and self.rank != 0 and _refuses(self._coordinator):
                self._end(f"{self.describe(0)}, at which the others meet, is gone", farewell=False)

    def _end(self, verdict: str, *, farewell: bool = True) -> None:
        if self._closing.is_set():
            return
        advice = f" {self.advice}" if self.advice else ""
        verdict = verdict.rstrip(".")
        print(f"error: {verdict}. {self.describe(self.rank)} stops.{advice}", file=sys.stderr)
        self.leave(LOST, farewell=farewell)


def _refuses(address: str) -> bool:
    """Whether host:port refuses connections. A time-out counts as no."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            return False
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False


def _own(error: BaseException) -> bool:
    """Whether an error is surely of this process: one of ours, and not made of something that came
    out of JAX, such as the failed collective inside of a save."""
    cause = error.__cause__
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, UserError)
        and (cause is None or isinstance(cause, OSError) or _own(cause))
    )


def process_name() -> str:
    """Host and process id of this process."""
    return f"{socket.gethostname()}, pid {os.getpid()}"


def _read(beat: str) -> dict[str, Any]:
    return json.loads(beat or "{}")

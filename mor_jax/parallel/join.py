"""Joining the job that the environment describes: `jax.distributed` with messages that name who is
missing."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax

from mor_jax.errors import ConfigError
from mor_jax.parallel.cluster import Cluster, detect
from mor_jax.parallel.multihost import LOST, Hosts, process_name

_HOSTS = Hosts()


def hosts() -> Hosts:
    """The job this process belongs to; of one process unless `initialize` found another."""
    return _HOSTS


def initialize(cluster: Cluster | None = None, *, timeout: float = 0.0, meet: float = 0.0) -> Hosts:
    """Join the job that the environment (or `cluster`) describes; before JAX is used for anything
    else.

    Args:
      timeout: seconds without a heartbeat after which a process counts as lost; 0:
        $MOR_JAX_HOST_TIMEOUT, else 60.
      meet: seconds in which all must have come; 0: $MOR_JAX_MEET_TIMEOUT, else 300. Process 0 lists
        those that did not.
    Raises:
      ConfigError: the environment contradicts itself.
    """
    global _HOSTS
    cluster = cluster or detect()
    if cluster is None or cluster.count == 1 or _HOSTS.count > 1:
        return _HOSTS
    timeout = timeout or _seconds("MOR_JAX_HOST_TIMEOUT", 60.0)
    meet = meet or _seconds("MOR_JAX_MEET_TIMEOUT", 300.0)
    _delay_abort()
    arrived = threading.Event()
    threading.Thread(target=_give_up, args=(arrived, meet, cluster), daemon=True).start()
    try:
        with _absent_listed(int(meet)):
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.count,
                cluster.rank,
                initialization_timeout=int(meet) + 30,
                heartbeat_timeout_seconds=int(max(100, 2 * timeout)),  # ours comes first
            )
    except ValueError as e:
        # a single TPU VM that describes no job
        if cluster.kind == "tpu" and "should be defined" in str(e):
            return _HOSTS
        raise ConfigError(f"cannot join the {cluster.kind} job: {e}") from e
    finally:
        arrived.set()
    # The store has no public name; Orbax takes it from here, too. Devices are not asked for: that
    # would have every process wait for all others' once more.
    from jax._src.distributed import global_state

    if global_state.num_processes > 1:
        state = global_state
        _HOSTS = Hosts(
            state.client,
            state.process_id,
            state.num_processes,
            timeout,
            state.coordinator_address or "",
        )
        atexit.register(_HOSTS.close)  # before JAX's own, which was registered first
    return _HOSTS


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if value < 1:
        raise ConfigError(
            f"the environment variable {name} = {text!r} must be a number of seconds, 1 or more."
        )
    return value


def _give_up(arrived: threading.Event, seconds: float, cluster: Cluster) -> None:
    if not arrived.wait(seconds + 2):
        count = f"the {cluster.count}" if cluster.count else "all"
        print(
            f"error: not {count} processes of this {cluster.kind} job met within {seconds:g} s "
            f"(this one is {process_name()}, the coordinator {cluster.coordinator or 'as JAX found it'}). Process 0 lists "
            "above the numbers of those that did not come. Look there, or raise $MOR_JAX_MEET_TIMEOUT.",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(LOST)


@contextlib.contextmanager
def _absent_listed(seconds: int) -> Iterator[None]:
    """Makes the service time out before the client, because its message lists the missing
    processes.

    `jax.distributed` has no argument for it; without the private name everything works, only less
    well said.
    """
    from jax._src import distributed

    module = getattr(distributed, "_jax", None)
    plain = getattr(module, "get_distributed_runtime_service", None)
    if module is None or plain is None or "cluster_register_timeout" not in (plain.__doc__ or ""):
        yield
        return
    module.get_distributed_runtime_service = functools.partial(
        plain, cluster_register_timeout=seconds
    )
    try:
        yield
    finally:
        module.get_distributed_runtime_service = plain


def _delay_abort() -> None:
    """JAX's client aborts the process as soon as process 0 closes its end, before anyone could say
    so. With libc's `sleep` as the handler of SIGABRT the aborting thread first waits as many
    seconds as the signal's number, 6, in which the watch names process 0. `sleep` may be called
    from a handler (POSIX) and takes one integer, as they do."""
    if sys.platform == "win32" or int(signal.SIGABRT) != 6:
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))

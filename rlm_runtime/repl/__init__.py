"""The REPL: a worker process that runs the model's code, and its host, which believes nothing the
worker says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlm_runtime.errors import UsageError
from rlm_runtime.repl.base import Environment, Limits

if TYPE_CHECKING:
    from rlm_runtime.repl.host import HostedEnvironment
    from rlm_runtime.repl.sandbox import SandboxPolicy

ENVIRONMENTS = ("local", "bubblewrap", "docker", "unconfined")


def make(
    kind: str = "local",
    limits: Limits | None = None,
    policy: SandboxPolicy | None = None,
    packages: tuple[str, ...] = (),
) -> Environment:
    """An environment that has not been started. Raises UsageError for an unknown kind or a package
    not installed."""
    from rlm_runtime.repl.sandbox import SandboxPolicy

    chosen: type[HostedEnvironment]
    if kind in ("local", "unconfined"):
        from rlm_runtime.repl.local import LocalEnvironment, UnconfinedEnvironment

        chosen = LocalEnvironment if kind == "local" else UnconfinedEnvironment
    elif kind == "bubblewrap":
        from rlm_runtime.repl.bubblewrap import BubblewrapEnvironment as chosen
    elif kind == "docker":
        from rlm_runtime.repl.docker import DockerEnvironment as chosen
    else:
        raise UsageError(f"environment={kind!r}: there are {', '.join(ENVIRONMENTS)}.")
    return chosen(limits or Limits(), policy or SandboxPolicy(), tuple(packages))

"""The run directory: whose it is, and what may differ when a run goes on in it."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from mor_jax.config import Config, from_dict
from mor_jax.data.prepare import PreparedData
from mor_jax.errors import ConfigError, UserError

# Fields that may differ between a run and its resumption: they change what is reported or what follows a bad step, and
# not the sums that are computed; a micro-batch divides by the whole batch's counts. Nor do those of config.mesh.
FREE_TO_CHANGE = {
    "log_every", "eval_every", "eval_rows", "checkpoint_every", "keep_checkpoints", "accum", "on_nonfinite",
    "on_spike", "spike_threshold", "cache_dir",
}  # fmt: skip


def claim(workdir: Path, cfg: Config, data: PreparedData) -> None:
    """Make `workdir` this run's: config.json and tokenizer.json. Raises ConfigError if it holds another one."""
    path = workdir / "config.json"
    if jax.process_index() != 0:
        return
    try:
        if path.exists():
            saved = from_dict(json.loads(path.read_text())).to_dict()
            changed = differences(saved, cfg.to_dict())
            if changed:
                raise ConfigError(
                    f"{workdir} holds a run with another configuration ({'; '.join(changed)}). "
                    "Give another --workdir, or the same configuration to resume."
                )
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, cfg.to_dict())
        if not any((workdir / "checkpoints").glob("[0-9]*")):  # else it is kept until it has been compared with theirs
            data.tokenizer.save(workdir)
    except OSError as e:
        raise UserError(f"cannot write to the run directory {workdir}: {e.strerror or e}.") from e
    except ValueError as e:
        raise ConfigError(f"{path} is not readable JSON ({e}); repair it or give another --workdir.") from e


def differences(old: dict, new: dict, where: str = "config") -> list[str]:
    """What keeps a run of configuration `new` from going on where one of `old` stopped; a phrase for each field."""
    changed = []
    for key in new:
        a, b = old.get(key), new[key]
        if isinstance(b, dict):
            changed += differences(a or {}, b, f"{where}.{key}")
        elif json.dumps(a) != json.dumps(b) and where != "config.mesh" and key not in FREE_TO_CHANGE:
            changed.append(f"{where}.{key}: {a!r} there, {b!r} here")
    return changed


def write_json(path: Path, value: Any) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def mesh_device(mesh: jax.sharding.Mesh) -> str:
    """For example "8 x TPU v5 lite, mesh 2x2x2" or "1 x cpu (2 cores)"."""
    device = mesh.devices.flat[0]
    kind = f"{device.device_kind} ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
    shape = f", mesh {'x'.join(map(str, mesh.devices.shape))}" if mesh.size > 1 else ""
    return f"{mesh.size} x {kind}{shape}"


def versions() -> dict[str, str]:
    """Python and the libraries whose version could change a number."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "mor-jax")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}

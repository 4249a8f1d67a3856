"""The run directory: which run it belongs to, and which fields may change when that run resumes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from mor_jax.config import Config, depth_policies, from_dict
from mor_jax.data.prepare import PreparedData
from mor_jax.errors import ConfigError, UserError
from mor_jax.paths import reason, steps_in, write_text

# What may differ between a run and its resumption, by field or by group. Three kinds:
#
# FREE may always. These fields change what is reported, where things lie, what follows a bad step,
# or how the same sums are computed (a micro-batch divides by the whole batch's counts), up to
# rounding. `data.paths` is judged by its content.
FREE = frozenset(
    {
        "name",
        "mesh",
        "model.remat",
        "model.attention",
        "model.loss_chunk",
        "model.scan_layers",
        "depth.executor",
        "data.cache_dir",
        "data.paths",
        "train.log_every",
        "train.trackers",
        "train.eval_every",
        "train.eval_rows",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.keep_best",
        "train.patience",
        "train.accum",
        "train.on_nonfinite",
        "train.on_spike",
        "train.spike_threshold",
    }
)
# NEVER may. They say what the weights and the token ids are. In `model` everything does but what is
# FREE, and `dtype`.
NEVER = frozenset(
    {
        "model",
        "depth.policy",
        "depth.router",
        "depth.score",
        "depth.gate",
        "depth.inference",
        "data.bpe_vocab",
        "optim.algorithm",
        "recursion",
        "adapter",
    }
)
# The rest may where `--allow` names it: the weights and the optimiser's state still fit, the
# numbers become others.
ALLOWED = frozenset({"model.dtype"})


def kind_of(field: str) -> str:
    """ "free", "allow" or "never", of a field such as "train.steps"."""
    group = field.partition(".")[0]
    if {field, group} & FREE:
        return "free"
    return "never" if {field, group} & NEVER and field not in ALLOWED else "allow"


def claim(
    workdir: epath.Path, cfg: Config, data: PreparedData, allow: Iterable[str] = ()
) -> list[str]:
    """Make `workdir` this run's: config.json and tokenizer.json. Returns what differs by leave of
    `allow`, in phrases.

    Args:
      allow: fields or groups of fields that may differ from those of the run there, e.g.
        "optim.peak_lr", "optim".
    Raises:
      ConfigError: it holds a run of another configuration, or `allow` names what may never differ.
      UserError: it cannot be written.
    """
    path = workdir / "config.json"
    allowed = tuple(_checked(allow))
    if jax.process_index() != 0:
        return []
    changed = {}
    try:
        if path.exists():
            saved = from_dict(json.loads(path.read_text())).to_dict()
            changed = _changes(saved, cfg.to_dict())
            _refuse(workdir, {f: text for f, text in changed.items() if not _named(f, allowed)})
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, cfg.to_dict())
        # else it is kept until it has been compared with theirs
        if not steps_in(workdir / "checkpoints"):
            data.tokenizer.save(workdir)
            if data.template is not None:
                data.template.save(workdir)
    except OSError as e:
        raise UserError(f"cannot write to the run directory {workdir}: {reason(e)}.") from e
    except ValueError as e:
        raise ConfigError(
            f"{path} is not readable JSON ({e}); repair it or give another --workdir."
        ) from e
    return list(changed.values())


def _refuse(workdir: epath.Path, changed: Mapping[str, str]) -> None:
    """Raises ConfigError for changes that `--allow` does not permit."""
    if not changed:
        return
    here = f"{workdir} holds a run with another configuration ({'; '.join(changed.values())})."
    never = [f"config.{field}" for field in changed if kind_of(field) == "never"]
    if never:
        raise ConfigError(
            f"{here} {', '.join(never)} can never change within a run. Give another --workdir, or the same configuration "
            "to resume."
        )
    raise ConfigError(
        f"{here} Give another --workdir, the same configuration to resume, or --allow={','.join(changed)} to go on with "
        "the new values from the last checkpoint."
    )


def _checked(allow: Iterable[str]) -> Iterator[str]:
    """Raises ConfigError for names that are no fields, or of what may never change."""
    fields = {name for name, _ in _flat(Config().to_dict())}
    fields |= {
        f"depth.{f.name}"
        for policy in depth_policies().values()
        for f in dataclasses.fields(policy)
    }
    names = fields | {name.partition(".")[0] for name in fields}
    for given in allow:
        name = given.strip().removeprefix("config.")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"--allow={given}: there is no such field."
                + (f" Did you mean {near[0]}?" if near else "")
            )
        if kind_of(name) == "never":
            raise ConfigError(
                f"--allow={given}: config.{name} can never change within a run. Give another --workdir."
            )
        yield name


def allows_other_data(allow: Iterable[str]) -> bool:
    """Whether other rows may follow: by any field of `data` that decides which they are."""
    names = {name.strip().removeprefix("config.") for name in allow}
    return any(name.partition(".")[0] == "data" for name in names - {"data.seed", "data.cache_dir"})


def _named(field: str, allowed: tuple[str, ...]) -> bool:
    return kind_of(field) != "never" and bool({field, field.partition(".")[0]} & set(allowed))


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, paths: bool = False
) -> list[str]:
    """What keeps a run of configuration `new` from going on as it is where one of `old` stopped; a
    phrase for each field.

    paths: count data.paths, which else is left to a comparison of the content."""
    return list(_changes(old, new, paths).values())


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], paths: bool = False) -> dict[str, str]:
    """{field: phrase} of `differences`."""
    before, changed = dict(_flat(old)), {}
    for field, value in _flat(new):
        a, counts = before.get(field), kind_of(field) != "free" or (paths and field == "data.paths")
        if counts and json.dumps(a) != json.dumps(value):
            changed[field] = f"config.{field}: {a!r} there, {value!r} here"
    return changed


def _flat(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def write_json(path: epath.Path, value: Any) -> None:
    """Raises OSError."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def mesh_device(mesh: jax.sharding.Mesh) -> str:
    """For example "8 x TPU v5 lite, mesh 2x2x2" or "1 x cpu (2 cores)"."""
    device = mesh.devices.flat[0]
    kind = (
        f"{device.device_kind} ({os.cpu_count()} cores)"
        if device.platform == "cpu"
        else device.device_kind
    )
    shape = f", mesh {'x'.join(map(str, mesh.devices.shape))}" if mesh.size > 1 else ""
    return f"{mesh.size} x {kind}{shape}"


def versions() -> dict[str, str]:
    """Python and the libraries whose version could change a number."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "mor-jax")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}

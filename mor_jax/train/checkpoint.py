"""Checkpoints: a thin, suspicious layer over Orbax's `CheckpointManager`.

A checkpoint of step N is the directory `DIR/N`: the arrays of the training state (sharded, written
in the background) and one JSON document with whatever the caller wants to travel along (config,
tokenizer, ...) and a digest of every array. Nothing is believed on the way back: the document
carries its own SHA-256, and the digests are computed again from the restored arrays, so a flipped
bit or a missing file is an error with a name and never a strange loss curve. Digests do not depend
on the sharding, so any mesh may read what another one wrote.

On object stores a step is finished when its `commit_success.txt` is there, as Orbax does it: they
have no rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from mor_jax.errors import CheckpointError
from mor_jax.paths import as_path, is_local, move
from mor_jax.train import digests, orbax

_LOG = logging.getLogger(__name__)
_FORMAT = 1
# Leaves, by the last part of their name, that an older checkpoint may lack; they begin at zero.
_FROM_ZERO = ("survey",)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint. `skipped` names the newer steps that were damaged, each with the
    reason."""

    step: int
    state: Any
    meta: dict[str, Any]
    skipped: Mapping[int, str] = dataclasses.field(default_factory=dict)


class _Damaged(Exception):
    """A step directory is damaged; the message says why."""


class Checkpointer:
    """Writes and restores the checkpoints of one run; a context manager that closes itself.

    All processes of a multi-process run make the same calls; process 0 does the renames.

    Args:
      directory: created if missing; a path of this machine, gs:// or s3://.
      keep: newest checkpoints kept; older ones are deleted once a newer one is durable.
      async_save: write in the background. The arrays are copied to the host before `save` returns,
        so the caller may donate them.
    Raises:
      CheckpointError: the directory cannot be created or written to.
    """

    def __init__(
        self, directory: os.PathLike[str] | str, *, keep: int = 3, async_save: bool = True
    ):
        self._directory = _absolute(directory)
        self._keep, self._async = keep, async_save
        # made by the first save: importing Orbax and listing the directory take a second
        self._manager: Any = None
        self._pending: int | None = None  # the step being written
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if is_local(self._directory) and not os.access(self._directory, os.W_OK | os.X_OK):
                raise PermissionError("the file system is read-only or the permissions forbid it")
        except OSError as e:
            reason = "it is not a directory" if isinstance(e, FileExistsError) else orbax.reason(e)
            raise CheckpointError(f"cannot write checkpoints to {directory}: {reason}.") from e

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Start to save; saving the newest step once more does nothing.

        Args:
          step: not lower than any step already in the directory.
          state: pytree of arrays; containers may be optax NamedTuples.
          meta: plain JSON.
        Raises:
          CheckpointError: this save could not start, or the previous one failed.
        """
        self.wait()
        body = {"meta": json.loads(json.dumps(meta)), "leaves": digests.table(state)}
        ocp = orbax.library()
        if is_local(self._directory) and not self._directory.exists():
            _LOG.warning(
                "%s has vanished, and the checkpoints in it; it is made anew.", self._directory
            )
        try:
            manager = self._manager = self._manager or orbax.manager(
                self._directory, self._keep, state
            )
            newest = manager.latest_step()
            if newest is not None and newest >= step:
                if newest == step:
                    return
                raise CheckpointError(
                    f"could not save step {step} to {self._directory}: it already holds step {newest}. "
                    "Resume from it or use another directory."
                )
            document = {"format": _FORMAT, "sha256": _sha256(body), "body": body}
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(document)
            )
            manager.save(step, args=items, force=True)
        except CheckpointError:
            raise
        except Exception as e:
            self._fail(step, e)
        self._pending = step
        if not self._async:
            self.wait()

    def check(self) -> None:
        """Raise CheckpointError if the save in the background has failed; costs a lock."""
        # Not `manager.check_for_errors()`: it takes the exception away from Orbax's own finalizing
        # thread, which would then believe in success and delete the oldest good checkpoint.
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Block until everything handed to `save` is durable. Raises CheckpointError if it could
        not be."""
        if self._pending is None:
            return
        step = self._pending
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            self._pending = None
            self._fail(step, e)
        self._pending = None

    def steps(self) -> list[int]:
        """Finished steps, ascending; the one being written is not among them."""
        return _steps(self._directory)

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """Restore the newest checkpoint that verifies; None if the directory has none.

        Newer ones that do not verify are renamed to `<step>.damaged` with a warning, never deleted;
        the run can then save those steps again. They are touched only once an older one has proved
        good.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` (or arrays) with the target shardings.
        Raises:
          CheckpointError: there are checkpoints but none verifies, or they do not fit
            `abstract_state`.
        """
        self.wait()
        skipped: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state, meta = _restore(self._directory, step, abstract_state, partial=False)
            except _Damaged as e:
                skipped[step] = str(e)
                continue
            if skipped:
                self._close_manager()  # it remembers the steps it has seen
                self._move_aside(skipped, step)
            return Restored(step, state, meta, skipped)
        if skipped:
            why = "\n".join(f"  step {step}: {reason}" for step, reason in skipped.items())
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be restored; nothing was changed there:\n{why}\n"
                "Move the directory away to start from the beginning."
            )
        return None

    def close(self) -> None:
        """Wait for the last save and release the threads."""
        try:
            self.wait()
        finally:
            self._close_manager()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as e:
            if kind is None:
                raise
            _LOG.error("%s", e)  # the exception already on its way out is the one to see

    def _close_manager(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # a failed save has been reported by `wait`
                manager.close()

    def _fail(self, step: int, error: Exception) -> NoReturn:
        """Remove what is left of a failed save and say what happened in one sentence."""
        self._close_manager()
        if jax.process_index() == 0:
            quiet = 0  # looks in a row that found nothing
            # writers of other arrays may still be at it, for seconds on a busy machine
            for _ in range(50):
                found = list(self._directory.glob(f"{step}{orbax.TMP}*"))
                for path in found:
                    _remove(path)
                quiet = 0 if found else quiet + 1
                if quiet == 3:
                    break
                time.sleep(0.2)
        steps = self.steps()
        intact = (
            f"Earlier checkpoints are intact (steps {_join(steps)})."
            if steps
            else "There is no earlier checkpoint."
        )
        reason = orbax.reason(error)
        todo = "Free space" if reason in orbax.FULL else "Repair the cause"
        raise CheckpointError(
            f"could not save step {step} to {self._directory}: {reason}. {intact} {todo} and start again to resume."
        ) from error

    def _move_aside(self, skipped: Mapping[int, str], good: int) -> None:
        for step, reason in skipped.items():
            if jax.process_index() != 0:
                continue
            source, target = self._directory / str(step), self._directory / f"{step}.damaged"
            if target.exists():
                target = self._directory / f"{step}.damaged-{time.time_ns()}"
            try:
                move(source, target)
            except OSError as e:
                raise CheckpointError(
                    f"cannot move the damaged {source} aside: {orbax.reason(e)}. Do it and start again."
                ) from e
            _LOG.warning(
                "the checkpoint of step %d in %s is damaged (%s); it is now called %s. Going on from step %d.",
                step,
                self._directory,
                reason,
                target.name,
                good,
            )
        _barrier("mor_jax_moved_aside")


def save_weights(
    directory: os.PathLike[str] | str, params: Any, meta: Mapping[str, Any], *, step: int = 0
) -> None:
    """Write a checkpoint of weights alone, which every command but `launch.train` reads; durable on
    return.

    `launch.convert --checkpoint` makes of it a run to train.

    Args:
      directory: the checkpoints/ of a run directory; created if missing.
      params: as `LM.init` returns them, arrays of jax or numpy.
      meta: plain JSON: "config" (`Config.to_dict`), "tokenizer" (`Tokenizer.to_json`), "data" (a
        fingerprint of what the model was trained on, or "") and, if it has one of its own,
        "chat_template" (Jinja).
    Raises:
      CheckpointError: it cannot be written, or that step or a later one is there.
    """
    missing = {"config", "tokenizer", "data"} - meta.keys()
    if missing:
        raise CheckpointError(
            f"cannot write weights to {directory}: meta lacks {', '.join(sorted(missing))}."
        )
    if steps := _steps(_absolute(directory)):
        raise CheckpointError(
            f"{directory} already holds checkpoints (steps {_join(steps)}); give another directory."
        )
    with Checkpointer(directory, async_save=False) as to:
        to.save(step, {"params": params}, {**meta, "step": step})


def load_meta(
    directory: os.PathLike[str] | str, step: int | None = None
) -> tuple[int, dict[str, Any]]:
    """(step, meta) of one checkpoint, the newest by default, without reading an array. Raises
    CheckpointError."""
    directory, step = _choose(directory, step)
    try:
        return step, _document(directory, step)["meta"]
    except _Damaged as e:
        raise _unusable(directory, step, e) from e


def restore_params(
    directory: os.PathLike[str] | str,
    abstract_params: Any,
    step: int | None = None,
    *,
    entry: str = "params",
) -> tuple[Any, int]:
    """(params, step): one `entry` of the saved state alone, verified. It writes nothing.

    Args:
      directory: where a `Checkpointer` saved a state with an entry or field of that name.
      abstract_params: pytree of `jax.ShapeDtypeStruct` with target shardings; another floating
        dtype is cast to.
      step: the newest by default.
    Raises:
      CheckpointError: there is no such checkpoint, it is damaged, or it does not fit.
    """
    directory, step = _choose(directory, step)
    try:
        state, _ = _restore(directory, step, {entry: abstract_params}, partial=True)
    except _Damaged as e:
        raise _unusable(directory, step, e) from e
    return state[entry], step


def _restore(
    directory: epath.Path, step: int, abstract: Any, *, partial: bool
) -> tuple[Any, dict[str, Any]]:
    """(state, meta) of one step, verified. Raises _Damaged, or CheckpointError if it does not fit
    `abstract`."""
    problem = None
    try:
        body = _document(directory, step)
    except _Damaged as e:
        problem = e
    _agree(problem)
    saved = body["leaves"]
    _check_fit(directory, step, abstract, saved, partial)

    whole = abstract
    abstract = _without(
        abstract, {name for name in digests.named(abstract)[0] if name not in saved}
    )
    names, leaves = digests.named(abstract)
    wanted = jax.tree.unflatten(
        jax.tree.structure(abstract),
        [
            jax.ShapeDtypeStruct(
                x.shape,
                x.dtype
                if jnp.issubdtype(x.dtype, jax.dtypes.extended)
                else jnp.dtype(saved[name][1]),
                sharding=_sharding(x),
            )
            for name, x in zip(names, leaves, strict=True)
        ],
    )
    ocp = orbax.library()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
            arguments = ocp.args.PyTreeRestore(
                item=wanted, restore_args=arguments, partial_restore=True
            )
            state = reader.restore(directory / str(step) / "state", args=arguments)
    except Exception as e:  # Orbax and TensorStore raise whatever they stumble over
        problem = _Damaged(f"its arrays cannot be read: {orbax.reason(e)}")
    _agree(problem)
    found = digests.table(state)
    for name in names:
        if found.get(name) != saved[name]:
            raise _Damaged(f"the values of {name} are not those that were saved")
    read = dict(zip(*digests.named(state), strict=True))

    def leaf(name: str, to: Any) -> jax.Array:
        if name not in read:
            return jnp.zeros(to.shape, to.dtype, device=_sharding(to))
        return read[name] if read[name].dtype == to.dtype else read[name].astype(to.dtype)

    state = [leaf(name, to) for name, to in zip(*digests.named(whole), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(whole), state), body["meta"]


def _sharding(x: Any) -> Any:
    return getattr(x, "sharding", None) or SingleDeviceSharding(jax.devices()[0])


def _without(tree: Any, missing: set[str]) -> Any:
    """The tree without the leaves of `_FROM_ZERO` if any of them is missing: all of one save are,
    or none."""
    if not missing:
        return tree

    def holds(x: object) -> bool:
        return isinstance(x, dict) and any(name in x for name in _FROM_ZERO)

    def drop(x: Any) -> Any:
        return {name: leaf for name, leaf in x.items() if name not in _FROM_ZERO} if holds(x) else x

    return jax.tree.map(drop, tree, is_leaf=holds)


def _check_fit(
    directory: epath.Path, step: int, abstract: Any, saved: Mapping[str, list[Any]], partial: bool
) -> None:
    expected = dict(zip(*digests.named(abstract), strict=True))
    entries = {name.partition("/")[0] for name in expected}
    wrong = []
    for name, x in expected.items():
        want = f"{digests.dtype(x)}{list(x.shape)}"
        if name not in saved:
            if name.rpartition("/")[2] in _FROM_ZERO:
                continue
            wrong.append(f"{name} is not in the checkpoint, {want} is expected")
            continue
        shape, dtype, _ = saved[name]
        castable = _is_float(dtype) and _is_float(digests.dtype(x))
        if shape != list(x.shape) or (dtype != digests.dtype(x) and not castable):
            wrong.append(f"{name} is {dtype}{shape} in the checkpoint, {want} is expected")
    wrong += [
        f"{name} is in the checkpoint but not expected"
        for name in saved
        if name not in expected and (not partial or name.partition("/")[0] in entries)
    ]
    if wrong:
        more = f" ({len(wrong) - 1} more leaves differ)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"the checkpoint of step {step} in {directory} does not fit the config: {wrong[0]}{more}. "
            "Use the config it was trained with or another directory."
        )


def _is_float(dtype: str) -> bool:
    with contextlib.suppress(TypeError):
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    return False


def _document(directory: epath.Path, step: int) -> dict[str, Any]:
    """The checked body of the JSON document of one step. Raises _Damaged."""
    path = directory / str(step) / "meta" / "metadata"
    try:
        document = json.loads(path.read_text())
        version, body, recorded = document["format"], document["body"], document["sha256"]
        good = _sha256(body) == recorded
    except FileNotFoundError:
        raise _Damaged(
            "meta/metadata is missing; the save was not completed or files were deleted"
        ) from None
    except OSError as e:
        raise _Damaged(f"meta/metadata cannot be read: {orbax.reason(e)}") from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise _Damaged("meta/metadata is not a document of mor_jax") from e
    if not good:
        raise _Damaged("meta/metadata has changed since it was saved")
    if version != _FORMAT:
        raise CheckpointError(
            f"{path} has format {version!r}; this mor_jax reads format {_FORMAT}."
        )
    return body


def _sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _choose(directory: os.PathLike[str] | str, step: int | None) -> tuple[epath.Path, int]:
    directory = _absolute(directory)
    steps = _steps(directory)
    if not steps:
        what = "holds no checkpoint" if directory.is_dir() else "is not a directory"
        raise CheckpointError(
            f"{directory} {what}; give the checkpoint directory of a training run."
        )
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{directory} has no checkpoint of step {step}; it has steps {_join(steps)}."
        )
    return directory, steps[-1] if step is None else step


def _unusable(directory: epath.Path, step: int, why: _Damaged) -> CheckpointError:
    others = []
    for other in reversed(_steps(directory)):
        with contextlib.suppress(_Damaged, CheckpointError):
            if other < step and _document(directory, other):
                others.append(other)
    hint = f" Try an earlier one: --step={others[0]}." if others else ""
    return CheckpointError(f"the checkpoint of step {step} in {directory} is damaged: {why}.{hint}")


def _steps(directory: epath.Path) -> list[int]:
    try:
        found = [
            p
            for p in directory.iterdir()
            if p.name.isdecimal() and str(int(p.name)) == p.name and p.is_dir()
        ]
    except OSError:
        return []
    # object stores have no atomic rename; Orbax marks the finished ones
    if not is_local(directory):
        found = [p for p in found if (p / "commit_success.txt").exists()]
    return sorted(int(p.name) for p in found)


def _agree(problem: _Damaged | None) -> None:
    """Raise `problem` in every process if any process has one, so that none waits for another."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        if problem is None and bool(multihost_utils.process_allgather(np.array(False)).any()):
            problem = _Damaged("another process could not read it")
        elif problem is not None:
            multihost_utils.process_allgather(np.array(True))
    if problem is not None:
        raise problem


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _remove(path: epath.Path) -> None:
    """Try to delete a directory."""
    with contextlib.suppress(OSError):
        path.rmtree()


def _absolute(path: os.PathLike[str] | str) -> epath.Path:
    path = as_path(path)
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


def _join(steps: list[int]) -> str:
    return ", ".join(map(str, steps))

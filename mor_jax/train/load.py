"""A trained model from its run directory: a checkpoint describes itself."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from mor_jax.analysis.runs import RunRecord
from mor_jax.config import AdapterConfig, Config, MeshConfig, from_dict
from mor_jax.data.chat import FILE as TEMPLATE_FILE
from mor_jax.data.chat import ChatTemplate, find_template
from mor_jax.data.tokenizer import load_tokenizer
from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import CheckpointError
from mor_jax.inference.engine.layers import is_matrix
from mor_jax.model.adapter import Adapters
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.paths import as_path
from mor_jax.train.bundle import is_bundle, read_bundle, restore, write_bundle
from mor_jax.train.checkpoint import load_meta, restore_params


class Loaded(NamedTuple):
    """A model ready to run."""

    lm: LM
    params: Any
    tokenizer: Tokenizer
    config: Config
    step: int
    data: str  # fingerprint of the rows it was trained on
    mesh: Mesh
    lineage: dict[str, Any] | None = None  # where its first weights came from, see `train.initial`
    chat_template: str | None = None  # Jinja; None: the plain one

    @property
    def template(self) -> ChatTemplate:
        """How messages become a prompt. Raises DataError: no valid Jinja."""
        return ChatTemplate(self.chat_template)


def save_bundle(
    loaded: Loaded, path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None
) -> int:
    """Write a model as a bundle (`train.bundle`), which `load_model` reads; returns its bytes.

    Args:
      provenance: how the weights were made and measured, in JSON; kept in model.json.
    """
    # `load_model` has merged them
    config = dataclasses.replace(loaded.config, adapter=AdapterConfig())
    meta = {
        "config": config.to_dict(),
        "tokenizer": loaded.tokenizer.to_json(),
        "data": loaded.data,
        "step": loaded.step,
        "lineage": loaded.lineage,
        "chat_template": loaded.chat_template,
    }
    return write_bundle(
        path,
        loaded.params,
        {name: x for name, x in meta.items() if x is not None},
        provenance or {},
    )


def checkpoint_directory(path: str | os.PathLike[str]) -> epath.Path:
    """The directory that holds the step directories, given it or the run directory above it."""
    path = as_path(path)
    inner = path / "checkpoints"
    return inner if inner.is_dir() else path


def load_model(
    path: str | os.PathLike[str],
    step: int | None = None,
    *,
    mesh: Mesh | Callable[[Config], Mesh] | None = None,
    average: bool = False,
    compute: bool = False,
) -> Loaded:
    """Model, weights and tokenizer of a checkpoint.

    Args:
      path: a run directory, its checkpoints/, or a bundle (`train.bundle`); on this machine, gs://
        or s3://.
      step: the newest by default.
      mesh: where the weights go, each device reading its own part; default: all devices, weights
        whole on each. A function is asked before any weight is read, and may raise.
      average: the running mean of the weights in place of the weights (`config.optim.ema`).
      compute: matrices in the compute dtype, as an engine reads them, instead of float32.
    Raises:
      CheckpointError: nothing there, damaged, or written by a newer version.
    """
    directory = checkpoint_directory(path)
    shipped = is_bundle(path)
    if shipped:
        meta, arrays = read_bundle(path)
        step = meta["step"]
    else:
        step, meta = load_meta(directory, step)
    try:
        config = from_dict(meta["config"])
        tokenizer_json, data = meta["tokenizer"], meta["data"]
    except KeyError as e:
        raise CheckpointError(
            f"the checkpoint of step {step} in {directory} lacks its {e}; is it one of mor_jax?"
        ) from e
    if not isinstance(mesh, Mesh):
        mesh = mesh(config) if mesh else make_mesh(MeshConfig(data=-1))
    lm = LM.from_config(config)
    adapters = Adapters(lm, config.adapter) if config.adapter.rank else None
    saved = adapters or lm
    shapes = jax.eval_shape(saved.init, jax.random.key(0))

    def place(
        path: Any, s: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding
    ) -> jax.ShapeDtypeStruct:
        cast = compute and not adapters and is_matrix(path)
        return jax.ShapeDtypeStruct(s.shape, lm.model.dtype if cast else s.dtype, sharding=sharding)

    where = lm.rules.shardings(mesh, saved.logical_axes())
    abstract = jax.tree_util.tree_map_with_path(place, shapes, where)
    if average and (shipped or not config.optim.ema):
        raise CheckpointError(
            f"{directory} holds no running mean of the weights, which config.optim.ema keeps."
        )
    if shipped:
        params = restore(arrays, abstract, path)
    else:
        params, step = restore_params(
            directory, abstract, step, entry="average" if average else "params"
        )
    lineage, template = meta.get("lineage"), chat_template(path, meta)
    if adapters is not None:
        params = adapters.merged(_base(directory, lineage, mesh), params)
    return Loaded(
        lm, params, tokenizer_from_json(tokenizer_json), config, step, data, mesh, lineage, template
    )


def _base(directory: epath.Path, lineage: dict[str, Any] | None, mesh: Mesh) -> Any:
    """The weights that the adapters of a checkpoint belong to."""
    parent = (lineage or {}).get("parent", "")
    try:
        return load_model(parent, (lineage or {})["step"], mesh=mesh).params
    except (CheckpointError, TypeError, KeyError) as e:
        raise CheckpointError(
            f"{directory} holds adapters of the weights in {parent or 'an unknown place'}, which cannot be read: {e}. Put "
            "them back, or merge the adapters where they are (launch.convert --merge)."
        ) from e


def chat_template(path: str | os.PathLike[str], meta: Mapping[str, Any]) -> str | None:
    """The Jinja source of the chat template of a checkpoint; None: it has none of its own.

    A file beside it goes first (chat_template.jinja, tokenizer_config.json), then what the
    checkpoint itself holds."""
    directory = checkpoint_directory(path)
    beside = directory.parent if directory.name == "checkpoints" else directory
    stored = meta.get("chat_template")
    if stored is not None and not (beside / TEMPLATE_FILE).is_file():
        return stored
    found = find_template(beside, meta["tokenizer"])
    return None if found.plain else found.source


def describe(
    path: str | os.PathLike[str], step: int | None = None
) -> tuple[Config, tuple[float, ...] | None]:
    """(configuration, measured share of tokens that run recursion r = 1..R) of a checkpoint, no
    array read.

    The shares are those of the newest causal evaluation in the run directory; None when nothing is
    routed, or nothing was measured. The mesh is left out: it was that of the machine that trained.
    Raises CheckpointError.
    """
    directory = checkpoint_directory(path)
    if is_bundle(path):
        return from_dict(read_bundle(path)[0]["config"]), None
    step, meta = load_meta(directory, step)
    if "config" not in meta:
        raise CheckpointError(
            f"the checkpoint of step {step} in {directory} has no config; is it one of mor_jax?"
        )
    config = dataclasses.replace(from_dict(meta["config"]), mesh=MeshConfig())
    run = directory.parent
    shares = (
        RunRecord.load(run).last_eval("causal/active_share")
        if (run / "metrics.jsonl").exists()
        else None
    )
    if not config.depth.routed or not isinstance(shares, list):
        return config, None
    return config, tuple(shares) if len(shares) == config.model.recursions else None


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer a checkpoint carries."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.json").write_text(text, encoding="utf-8")
        return load_tokenizer(directory)


def check_tokenizer(loaded: Loaded, other: Tokenizer, name: str) -> None:
    """Raise CheckpointError unless `other` is the tokenizer the model was trained with."""
    if other.vocab_size > loaded.lm.model.vocab_size:
        raise CheckpointError(
            f"the tokenizer {name} does not fit the checkpoint: it has {other.vocab_size} tokens, the model's table "
            f"{loaded.lm.model.vocab_size}. Leave it out: the checkpoint carries its own."
        )
    if other.fingerprint() != loaded.tokenizer.fingerprint():
        raise CheckpointError(
            f"the tokenizer {name} does not fit the checkpoint: the model was trained with another one, whose ids mean "
            "other text. Leave it out: the checkpoint carries its own."
        )

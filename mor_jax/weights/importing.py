"""Published weights become a run directory whose checkpoint describes itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import Config, DataConfig
from mor_jax.data.chat import ChatTemplate
from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import CheckpointError
from mor_jax.model.lm import LM
from mor_jax.paths import as_path, steps_in
from mor_jax.train.checkpoint import save_weights
from mor_jax.train.lock import hold
from mor_jax.train.workdir import write_json
from mor_jax.weights.families import Place
from mor_jax.weights.gguf_file import Gguf
from mor_jax.weights.huggingface import HuggingFace
from mor_jax.weights.source import WeightSource, check_tensors


class Imported(NamedTuple):
    """What was written."""

    config: Config
    tokenizer: Tokenizer
    template: ChatTemplate
    parameters: int


def open_source(source: str | os.PathLike[str], *, context: int = 0) -> WeightSource:
    """The reader of `hf:DIR`, of a directory with a config.json, or of FILE.gguf.

    Args:
      context: longest sequence; 0: the model's own.
    Raises:
      CheckpointError: it is neither, damaged, or of an unknown architecture.
      UserError: the package that reads it is not installed.
    """
    text = os.fspath(source)
    if text.startswith("hf:"):
        return HuggingFace(text.removeprefix("hf:"), context=context)
    if text.endswith(".gguf"):
        return Gguf(text, context=context)
    raise CheckpointError(f"--from={text}: expected hf:DIRECTORY or FILE.gguf.")


def import_weights(
    source: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    context: int = 0,
    tokenizer: str | os.PathLike[str] = "",
) -> Imported:
    """Write a run directory with the weights of `source` as the checkpoint of step 0.

    It holds weights alone, float32: every command reads it but `launch.train`, for which
    `convert_checkpoint` makes a run of it. Tensors are read one by one, so no second copy of the
    model is made here.

    Args:
      source: hf:DIR or FILE.gguf.
      context: longest sequence; 0: the model's own.
      tokenizer: a tokenizer.json to use instead of the one in `source`.
    Raises:
      CheckpointError: an unknown architecture, tensor or tokenizer, or `workdir` holds a run
        already.
      UserError: the package that reads such files is not installed.
    """
    workdir = as_path(workdir)
    if (workdir / "config.json").exists() or steps_in(workdir / "checkpoints"):
        raise CheckpointError(f"{workdir} already holds a run; give another --workdir.")
    opened = open_source(source, context=context)
    model = opened.model
    wanted = opened.places()
    check_tensors(opened.shapes(), wanted, opened.where)
    words = opened.tokenizer(tokenizer)
    if words.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{opened.where}: its tokenizer has {words.vocab_size} tokens, its table {model.vocab_size} rows."
        )
    chat = ChatTemplate(opened.chat_template)
    data = DataConfig(tokenizer=str(workdir / "tokenizer.json"))
    name = as_path(opened.where).stem
    config = Config(name=name, model=model, depth=opened.depth, data=data)
    params = _read(opened, wanted, config)
    meta: dict[str, Any] = {
        "config": config.to_dict(),
        "tokenizer": words.to_json(),
        "data": "",
        "imported": {"source": os.fspath(source)},
    }
    if not chat.plain:
        meta["chat_template"] = chat.source
    with hold(workdir):
        save_weights(workdir / "checkpoints", params, meta)
        words.save(workdir)
        if not chat.plain:
            chat.save(workdir)
        write_json(workdir / "config.json", config.to_dict())
    return Imported(config, words, chat, sum(x.size for x in jax.tree.leaves(params)))


def _read(source: WeightSource, wanted: Mapping[str, Place], config: Config) -> dict[str, Any]:
    """The parameter tree, made leaf by leaf; beside it no more than one leaf exists twice."""
    parts: dict[tuple[str, ...], list[str]] = {}
    for name, place in wanted.items():
        parts.setdefault(place.leaf, []).append(name)

    def leaf(path: tuple[Any, ...], to: jax.ShapeDtypeStruct) -> jax.Array:
        names = parts[tuple(key.key for key in path)]
        # Orbax copies arrays of numpy before it writes them, all at once; so jax's.
        if len(names) == 1:
            return jnp.array(source.read(names[0]).reshape(to.shape))
        x = np.empty(to.shape, to.dtype)
        for name in names:
            x[wanted[name].index] = source.read(name).reshape(x[wanted[name].index].shape)
        return jnp.array(x)

    shapes = jax.eval_shape(LM.from_config(config).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(leaf, shapes)

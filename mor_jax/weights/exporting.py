"""A checkpoint as a directory that other tools load: config.json, safetensors, tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors

from mor_jax.config import Config
from mor_jax.data.bpe import BpeTokenizer
from mor_jax.data.chat import ChatTemplate
from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import CheckpointError
from mor_jax.model.program import build_program, unrolled_blocks
from mor_jax.paths import as_path, is_local, reason, write_text
from mor_jax.train.load import load_model
from mor_jax.weights.families import Place, config_of, places
from mor_jax.weights.huggingface import INDEX
from mor_jax.weights.remote_code import (
    config_with_code,
    derived_tensors,
    places_with_code,
    write_code,
)
from mor_jax.weights.source import needed

SHARD = 4 << 30  # bytes of a file


class Exported(NamedTuple):
    """What was written."""

    architecture: str
    layers: int  # a shared block counts once where the code beside the weights repeats it
    files: tuple[str, ...]  # of weights
    step: int


def export_weights(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    average: bool = False,
    shard_bytes: int = SHARD,
    remote_code: bool | None = None,
) -> Exported:
    """Write a checkpoint for other tools, in float32; importing it again gives the same bits.

    A plain model, or one of fixed recursions, becomes a Llama, Qwen2 or Qwen3: a shared block is
    written once for each time it runs. Any other is written as it is, with PyTorch code that
    computes it (`remote/`), which transformers runs with `trust_remote_code=True`.

    Args:
      checkpoint: as of `train.load.load_model`.
      average: write the running mean of the weights.
      directory: of this machine; created, and refused where it holds a model.
      shard_bytes: of tensors in a file, at most, unless one tensor is larger.
      remote_code: whether to write it with code; None: where no published architecture computes
        it. True keeps the blocks of a recursive model shared.
    Raises:
      CheckpointError: neither a published architecture nor the code computes this model.
      UserError: safetensors is not installed, or the directory cannot be written.
    """
    needed("safetensors", "writing safetensors")
    target = as_path(str(directory).removeprefix("hf:"))
    if not is_local(target):
        raise CheckpointError(f"--to={directory}: give a directory of this machine.")
    if (target / "config.json").exists() or list(target.glob("*.safetensors")):
        raise CheckpointError(f"{target} already holds a model; give another directory.")
    loaded = load_model(checkpoint, step, average=average)
    config, wanted, layers = _form(loaded.config, remote_code)
    config |= _ids(loaded.tokenizer)
    with_code = "auto_map" in config
    derived = derived_tensors(loaded.config, loaded.params) if with_code else {}
    try:
        target.mkdir(parents=True, exist_ok=True)
        files = _write_tensors(target, wanted, loaded.params, shard_bytes, derived)
        if with_code:
            write_code(target)
        _write_tokenizer(target, loaded.tokenizer, loaded.template, loaded.config.model.context)
        _json(target / "generation_config.json", _ids(loaded.tokenizer))
        _json(target / "config.json", config)  # last: a directory left half-made is no model
    except OSError as e:
        raise CheckpointError(f"cannot write to {target}: {reason(e)}.") from e
    return Exported(str(config["model_type"]), layers, files, loaded.step)


def _form(
    config: Config, remote_code: bool | None
) -> tuple[dict[str, object], dict[str, Place], int]:
    """(config.json, every tensor, layers) of the published architecture that computes this model,
    or of the code beside the weights."""
    try:
        blocks = unrolled(config)
        plain = config_of(config.model, len(blocks)), places(config.model, blocks), len(blocks)
    except CheckpointError:
        if remote_code is False:
            raise
        plain = None
    if plain is not None and not remote_code:
        return plain
    layers = build_program(config.model).unique_layers
    return config_with_code(config), places_with_code(config), layers


def unrolled(config: Config) -> list[tuple[str, str]]:
    """The block of every layer a token goes through: its part and number.

    Raises CheckpointError: it is not the same for all tokens, or not the same block each time."""
    m, depth = config.model, config.depth
    if depth.routed and m.recursions > 1:
        raise CheckpointError(
            f"depth.policy = {depth.policy!r} lets tokens differ in depth, which no published architecture computes."
        )
    if m.recursions > 1 and not m.sharing.endswith("sequence") and depth.kv not in ("", "full"):
        raise CheckpointError(
            f"depth.kv = {depth.kv!r} shares keys between recursions; only 'full' can be unrolled."
        )
    if m.networks > 1 or m.bidirectional:
        raise CheckpointError(
            "this model applies several cores in turn (model.networks), or sees later tokens (model.bidirectional), which "
            "cannot be written for other tools yet."
        )
    if m.relaxed:
        raise CheckpointError(
            "recursions of this model have something of their own (norms, lora_rank or recursion_encoding), which no "
            "published architecture computes."
        )
    c = config.recursion
    if m.norm_placement != "pre" or m.layer_scale or c.reads or c.exits or c.loss == "gate":
        raise CheckpointError(
            "this model has other norms than a Llama's (norm_placement, layer_scale), or steps with knobs of "
            "config.recursion, which no published architecture computes."
        )
    return unrolled_blocks(build_program(m))


def _write_tensors(
    target: epath.Path,
    wanted: Mapping[str, Place],
    params: Mapping[str, Any],
    limit: int,
    derived: Mapping[str, np.ndarray],
) -> tuple[str, ...]:
    """Write the weights, no more than one file's in memory at once; returns the files' names.

    derived: small tensors that are no part of `params`; they go into the last file."""
    from safetensors.numpy import save_file

    groups = list(_groups(wanted, limit))
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else ["model.safetensors"]
    files: dict[str, str] = {}
    for file, group in zip(names, groups, strict=True):
        tensors = {name: _tensor(params, wanted[name]) for name in group}
        tensors |= derived if file == names[-1] else {}
        save_file(tensors, str(target / file), {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if len(groups) > 1:
        total = sum(4 * int(np.prod(place.shape)) for place in wanted.values())
        _json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    return tuple(names)


def _groups(wanted: Mapping[str, Place], limit: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, place in wanted.items():
        more = 4 * int(np.prod(place.shape))
        if group and size + more > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += more
    yield group


def _tensor(params: Mapping[str, Any], place: Place) -> np.ndarray:
    leaf: Any = params
    for key in place.leaf:
        leaf = leaf[key]
    return np.ascontiguousarray(np.asarray(leaf)[place.index].reshape(place.shape))


def _ids(tokenizer: Tokenizer) -> dict[str, object]:
    """Ids of the tokens that open and close texts; the document's end first."""
    ends = [tokenizer.eos, *sorted(tokenizer.ends - {tokenizer.eos})]
    return {"bos_token_id": tokenizer.bos, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def _write_tokenizer(
    target: epath.Path, tokenizer: Tokenizer, template: ChatTemplate, context: int
) -> None:
    text = (
        tokenizer.library_json() if isinstance(tokenizer, BpeTokenizer) else _bytes_json(tokenizer)
    )
    hf = tokenizers.Tokenizer.from_str(text)
    bos, eos = (tokenizer.token_text(i) for i in (tokenizer.bos, tokenizer.eos))
    plain = hf.encode("a", add_special_tokens=False).ids
    puts = hf.encode("a").ids
    if tokenizer.add_bos and puts[:1] != [tokenizer.bos]:
        hf.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos)]
        )
        text = hf.to_str()
    elif not tokenizer.add_bos and puts != plain:
        hf.post_processor = processors.ByteLevel(trim_offsets=False)
        text = hf.to_str()
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": tokenizer.add_bos,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if not template.plain:
        settings["chat_template"] = template.source
        template.save(target)
    _json(target / "tokenizer_config.json", settings)
    write_text(target / "tokenizer.json", text)


def _bytes_json(tokenizer: Tokenizer) -> str:
    """The byte tokenizer as a byte-level BPE that merges nothing, with the same ids."""
    letters = _letters()
    hf = tokenizers.Tokenizer(models.BPE({letter: b for b, letter in enumerate(letters)}, []))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([tokenizer.token_text(i) for i in (tokenizer.bos, tokenizer.eos)])
    return hf.to_str()


def _letters() -> list[str]:
    """The letter that byte-level tokenizers write each byte as: itself if it can be seen, else one
    from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in seen else chr(next(hidden)) for b in range(256)]


def _json(path: epath.Path, value: Mapping[str, object]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

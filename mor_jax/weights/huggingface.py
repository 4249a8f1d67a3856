"""A directory as Hugging Face writes it: config.json, safetensors (one file or several),
tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from mor_jax.config import Config, DepthConfig, ModelConfig
from mor_jax.data.bpe import BpeTokenizer
from mor_jax.data.chat import find_template
from mor_jax.data.vocabulary import FILE, Tokenizer
from mor_jax.errors import CheckpointError
from mor_jax.paths import as_path, is_local
from mor_jax.weights.families import Place, model_of, plain_places
from mor_jax.weights.remote_code import ARCHITECTURE, DERIVED, config_from, places_with_code
from mor_jax.weights.source import framing_of, library_tokenizer, needed

INDEX = "model.safetensors.index.json"
# Buffers that files hold beside the weights; they follow from the configuration and the weights.
BUFFERS = (".rotary_emb.inv_freq", DERIVED)
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}


class HuggingFace:
    """Reads such a directory. Nothing but the asked tensor is ever in memory.

    Raises:
      CheckpointError: no such directory, files missing, or an architecture that this project does
        not have.
    """

    def __init__(self, directory: str, *, context: int = 0):
        needed("safetensors", "reading safetensors")
        self._path = as_path(directory)
        self.where = str(directory)
        if not is_local(self._path) or not self._path.is_dir():
            raise CheckpointError(f"{directory} is not a directory of this machine.")
        self._config = self._json("config.json")
        self.model, self.depth = self._shape(f"{directory}/config.json", context)
        self._files = self._listed()
        template = find_template(self._path)
        self.chat_template: str | None = None if template.plain else template.source

    def _shape(self, where: str, context: int) -> tuple[ModelConfig, DepthConfig]:
        if not self._coded():
            return model_of(self._config, where, context), DepthConfig()
        model, depth = config_from(self._config, where)
        if context > model.context:
            raise CheckpointError(
                f"{where}: a context of {context} is too long: {model.context} tokens is longest."
            )
        return dataclasses.replace(model, context=context or model.context), depth

    def _coded(self) -> bool:
        """Whether it was written with code of this project."""
        return self._config.get("architectures") == [ARCHITECTURE]

    def places(self) -> dict[str, Place]:
        if self._coded():
            return places_with_code(Config(model=self.model, depth=self.depth))
        return plain_places(self.model)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, file in self._files.items():
            with self._open(file) as tensors:
                if name not in tensors.keys():  # noqa: SIM118, it is no dict
                    raise CheckpointError(
                        f"{file}: the tensor {name} is missing, though {INDEX} names it."
                    )
                found[name] = tuple(tensors.get_slice(name).get_shape())
        if self.model.tied and "lm_head.weight" in found:
            self._check_tie()
            del found["lm_head.weight"]
        return found

    def read(self, name: str) -> np.ndarray:
        file = self._files[name]
        with self._open(file) as tensors:
            part = tensors.get_slice(name)
            if part.get_dtype() == "BF16":  # numpy has no such type
                return self._bfloat16(file, name)
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{file}: the tensor {name} is of type {part.get_dtype()}, which cannot be read."
                )
            return np.asarray(tensors.get_tensor(name), np.float32)

    def tokenizer(self, path: str | os.PathLike[str] = "") -> Tokenizer:
        path = as_path(path or self._path / FILE)
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing. Have transformers write it (AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...)), or give one with --tokenizer."
            )
        return _framed(
            path,
            self._config,
            self._json("tokenizer_config.json", {}),
            self._json("generation_config.json", {}),
        )

    def _json(self, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
        path = self._path / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if default is not None:
                return default
            raise CheckpointError(
                f"{self.where} has no {name}; give a directory as Hugging Face writes it."
            ) from None
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path} cannot be read ({e}).") from e
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} must hold an object.")
        return value

    def _listed(self) -> dict[str, epath.Path]:
        """The file of every tensor."""
        if (self._path / INDEX).is_file():
            index = self._json(INDEX).get("weight_map")
            if not isinstance(index, Mapping):
                raise CheckpointError(f"{self._path / INDEX} has no weight_map.")
            files = {name: self._path / str(file) for name, file in index.items()}
        else:
            single = self._path / "model.safetensors"
            if not single.is_file():
                raise CheckpointError(f"{self.where} has neither model.safetensors nor {INDEX}.")
            with self._open(single) as tensors:
                files = dict.fromkeys(tensors.keys(), single)
        for file in dict.fromkeys(files.values()):
            if file.parent != self._path or not file.is_file():
                raise CheckpointError(
                    f"{file} is missing, though {INDEX} names it; is the download complete?"
                )
        return {name: file for name, file in files.items() if not name.endswith(BUFFERS)}

    def _open(self, file: epath.Path) -> Any:
        safetensors = needed("safetensors", "reading safetensors")
        try:
            return safetensors.safe_open(str(file), "numpy")
        except (OSError, safetensors.SafetensorError) as e:
            raise CheckpointError(f"{file} cannot be read as safetensors ({e}).") from e

    def _bfloat16(self, file: epath.Path, name: str) -> np.ndarray:
        """float32 of the stored halves of float32."""
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            entry = json.loads(f.read(size))[name]
            start, end = entry["data_offsets"]
            f.seek(8 + size + start)
            halves = np.frombuffer(f.read(end - start), np.dtype("<u2"))
        return (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])

    def _check_tie(self) -> None:
        table, head = (self.read(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        if not np.array_equal(table, head):
            raise CheckpointError(
                f"{self.where}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight. Set it to false if the head is the model's own, or remove the tensor."
            )


def _framed(
    path: epath.Path,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> Tokenizer:
    """A tokenizer.json with what the files beside it say: added tokens, ends of sequence, whether
    bos comes first.

    Args:
      config, settings, generation: config.json, tokenizer_config.json, generation_config.json.
    Raises:
      CheckpointError: it cannot be read, or nothing says what ends a text.
    """
    hf = library_tokenizer(path)
    _add_tokens(hf, settings.get("added_tokens_decoder") or {}, str(path))

    def token(name: str) -> int | None:
        given = settings.get(name)
        given = given.get("content") if isinstance(given, Mapping) else given
        return hf.token_to_id(given) if isinstance(given, str) else None

    ends: list[int] = []
    for found in (config.get("eos_token_id"), token("eos_token"), generation.get("eos_token_id")):
        ends += found if isinstance(found, list) else [found] if isinstance(found, int) else []
    bos = token("bos_token")
    if bos is None and isinstance(config.get("bos_token_id"), int):
        bos = config["bos_token_id"]
    first = hf.encode("a").ids[:1]  # with what the file's own post-processor adds
    puts = (
        bos is not None
        and first == [bos]
        and hf.encode("a", add_special_tokens=False).ids[:1] != first
    )
    add_bos = settings.get("add_bos_token")
    add_bos = add_bos if isinstance(add_bos, bool) else puts
    known = set(hf.get_vocab(with_added_tokens=True).values())
    ends = [i for i in ends if i in known]
    return BpeTokenizer(
        hf, str(path), framing_of(hf, bos if bos in known else None, ends, add_bos, str(path))
    )


def _add_tokens(hf: tokenizers.Tokenizer, given: Mapping[str, Any], where: str) -> None:
    """Tokens of tokenizer_config.json that tokenizer.json lacks, at the ids they are given."""
    for number, fields in sorted(given.items(), key=lambda item: int(item[0])):
        content, special = str(fields.get("content", "")), bool(fields.get("special", False))
        found = hf.token_to_id(content)
        if found is None:
            flags = {
                key: bool(fields[key])
                for key in ("lstrip", "rstrip", "single_word", "normalized")
                if key in fields
            }
            added = tokenizers.AddedToken(content, special=special, **flags)
            _ = hf.add_special_tokens([added]) if special else hf.add_tokens([added])
            found = hf.token_to_id(content)
        if found != int(number):
            raise CheckpointError(
                f"{where}: the added token {content!r} has id {found}, {number} is stated beside it."
            )

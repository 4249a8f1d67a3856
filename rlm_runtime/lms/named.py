"""Models under names of your own, with their options, in a TOML file.

    [reader]
    model = "openai:gpt-4o"
    base_url = "https://example.openai.azure.com/openai/deployments/reader"
    api_key_env = "AZURE_KEY"
    query = { "api-version" = "2024-10-21" }
    temperature = 0.2

    [mine]
    class = "my_package.my_module:MyLM"
    path = "weights/"

`model` is what `lms.resolve` takes, `class` names a class (or function) to call; the rest are its
keyword arguments.
"""

from __future__ import annotations

import importlib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.lms import resolve
from rlm_runtime.lms.base import LM
from rlm_runtime.lms.http import same_origin

Entry = dict[str, Any]
OF_ENDPOINT = (
    "base_url",
    "api_key",
    "api_key_env",
    "headers",
    "query",
)  # shared only at one endpoint


def read(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """The entries of a file by their names.

    Raises:
      UsageError: no such file, no TOML, an entry without `model` or `class`; the message never
        shows a value.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        hint = " A model itself is named with --root or --sub." if ":" in str(path) else ""
        raise UsageError(f"models file {path}: {e.strerror or e}.{hint}") from None
    except ValueError as e:
        raise UsageError(f"models file {path} is not TOML: {e}.") from None
    for name, entry in found.items():
        if not isinstance(entry, dict) or not isinstance(
            entry.get("model", entry.get("class")), str
        ):
            raise UsageError(
                f'models file {path}: [{name}] needs model = "openai:MODEL" or class = "module:NAME".'
            )
        if ":" in name:
            raise UsageError(
                f"models file {path}: [{name}]: a name has no colon; that is a provider's model."
            )
        if "model" in entry and "class" in entry:
            raise UsageError(
                f"models file {path}: [{name}] has both model and class; one of them makes the model."
            )
    return found


def make(name: str, entry: Entry, **more: Any) -> LM:
    """The model of one entry; options in `more` that are not None go before the entry's.

    With a `base_url` of another origin in `more`, the entry's key, headers and query stay behind:
    they belong to the entry's endpoint.

    Raises:
      UsageError: an unknown model or option, a missing key, a class that cannot be imported or
        made.
    """
    given = {k: v for k, v in more.items() if v is not None}
    if "base_url" in given and not same_origin(given["base_url"], entry.get("base_url", "")):
        entry = {k: v for k, v in entry.items() if k not in OF_ENDPOINT}
    options = entry | given
    spec, target = options.pop("model", None), options.pop("class", None)
    if spec is not None:
        return resolve(spec, **options)
    module, _, attribute = str(target).partition(":")
    try:
        lm = getattr(importlib.import_module(module), attribute)(**options)
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        raise UsageError(f"model {name!r}: {target} cannot be made: {type(e).__name__}: {e}") from e
    return resolve(lm)


def load_models(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, LM]:
    """The models of a file by their names, all or those in `names`: `RLM(models["big"],
    models["small"])`.

    Raises:
      UsageError: see `read` and `make`; a name that the file lacks.
    """
    entries = read(path)
    wanted = list(entries) if names is None else list(names)
    for name in wanted:
        if name not in entries:
            raise UsageError(
                f"models file {path}: there is no [{name}]; it has {', '.join(entries) or 'none'}."
            )
    return {name: make(name, entries[name]) for name in wanted}

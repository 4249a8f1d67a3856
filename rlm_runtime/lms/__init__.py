"""Language models behind one protocol (`lms/base.py`), by name: `resolve("openai:gpt-5-mini")`.

A new provider is one file with a class whose first argument is what follows the colon, and its
name: a line in `PROVIDERS`, or `@register("name")` above the class, or an entry point of the group
`rlm_runtime.lms` in a package.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import LM

Factory = Callable[..., LM]
F = TypeVar("F", bound=Factory)

ENTRY_POINTS = "rlm_runtime.lms"
PROVIDERS: dict[str, str | Factory] = {  # "module:name" is imported when first asked for
    "openai": "rlm_runtime.lms.openai:OpenAILM",
    "anthropic": "rlm_runtime.lms.anthropic:AnthropicLM",
    "checkpoint": "rlm_runtime.lms.checkpoint:CheckpointLM",
}


# The model that comes with the package (docs/native.md): a bundle, as `checkpoint:` reads it.
NATIVE = "native"
_SHIPPED = f"checkpoint:{Path(__file__).resolve().parent.parent / NATIVE}"


def register(provider: str) -> Callable[[F], F]:
    """Makes a class (or function) the provider of this name: `resolve("provider:MODEL")` calls it
    with MODEL.

        @register("mistral")
        class MistralLM(OpenAILM): ...

    Raises:
      UsageError: the name is taken by something else, or cannot stand before a colon.
    """

    if not provider or ":" in provider:
        raise UsageError(
            f"{provider!r} cannot be the name of a provider: it stands before a colon."
        )

    def note(factory: F) -> F:
        held = PROVIDERS.get(provider)
        if held is not None and _path(held) != _path(factory):
            raise UsageError(
                f"the provider {provider!r} is {_path(held)} already; choose another name."
            )
        PROVIDERS[provider] = factory
        return factory

    return note


def resolve(spec: str | LM, **options: Any) -> LM:
    """The model `spec` names: "openai:MODEL" (any compatible endpoint, with base_url=),
    "anthropic:MODEL", "checkpoint:PATH", "native" (the one that comes with the package), or a
    registered provider's; a model itself is returned as it is.

    Args:
      options: of the provider's class (`lms.chat.ChatLM` has those of all endpoints); those that
        are None are left to its defaults.
    Raises:
      UsageError: an unknown provider or option (the valid ones are named), a missing key, no such
        checkpoint.
    """
    options = {k: v for k, v in options.items() if v is not None}
    if not isinstance(spec, str):
        if not isinstance(spec, LM):
            raise UsageError(
                f'a model is a name like "openai:gpt-5-mini" or an LM object, got {type(spec).__name__}.'
            )
        if options:
            raise UsageError(
                f"{spec.name} is a model already: give it {', '.join(options)} where it is made."
            )
        return spec
    spec = _SHIPPED if spec == NATIVE else spec
    made, model = factory_of(spec), spec.partition(":")[2]
    allowed = options_of(made)
    for option in options:
        if allowed is not None and option not in allowed:
            near = difflib.get_close_matches(option, allowed, 1)
            said = (
                f" Did you mean {near[0]}?" if near else f" It takes {', '.join(sorted(allowed))}."
            )
            raise UsageError(f"{spec}: no such option: {option}.{said}")
    return made(model, **options)


def factory_of(spec: str) -> Factory:
    """The class (or function) that makes the model of this name. Raises UsageError."""
    provider, colon, model = (_SHIPPED if spec == NATIVE else spec).partition(":")
    if provider not in PROVIDERS and colon:
        for entry in metadata.entry_points(group=ENTRY_POINTS):
            PROVIDERS.setdefault(entry.name, entry.value)
    if provider not in PROVIDERS or not model:
        names = ", ".join(f"{p}:{'PATH' if p == 'checkpoint' else 'MODEL'}" for p in PROVIDERS)
        near = difflib.get_close_matches(provider, PROVIDERS, 1)
        said = f" Did you mean {near[0]}:{model or 'MODEL'}?" if near and colon else ""
        raise UsageError(
            f"unknown model {spec!r}.{said} Known: {names}, {NATIVE}. Another server's model: openai:MODEL with base_url."
        )
    held = PROVIDERS[provider]
    if isinstance(held, str):
        module, _, name = held.partition(":")
        held = getattr(importlib.import_module(module), name)
    return held


def options_of(factory: Factory) -> set[str] | None:
    """Keyword arguments of a provider; those it passes on to its bases and its endpoint included.
    None: it takes any."""
    from rlm_runtime.lms.chat import ChatLM

    if not inspect.isclass(factory):
        parameters = list(inspect.signature(factory).parameters.values())[1:]
        return (
            None
            if any(p.kind is p.VAR_KEYWORD for p in parameters)
            else {p.name for p in parameters}
        )
    names: set[str] = set()
    for made in factory.__mro__:
        if "__init__" not in vars(made) or made is object:
            continue
        parameters = list(inspect.signature(vars(made)["__init__"]).parameters.values())[2:]
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if made is ChatLM:
            from rlm_runtime.lms.http import Endpoint

            passed = inspect.signature(Endpoint).parameters.values()
            inside = {"secrets", "hint", "auth_hint", "refused"}
            return names | ({p.name for p in passed if p.kind is p.KEYWORD_ONLY} - inside)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _path(factory: str | Factory) -> str:
    return factory if isinstance(factory, str) else f"{factory.__module__}:{factory.__qualname__}"

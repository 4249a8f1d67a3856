"""Language models behind one protocol (`lms/base.py`), by name: `resolve("openai:gpt-5-mini")`.

A new provider is one file with a class whose first argument is what follows the colon, and one line here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import LM

PROVIDERS = {  # imported when first asked for
    "openai": "rlm_runtime.lms.openai:OpenAILM",
    "anthropic": "rlm_runtime.lms.anthropic:AnthropicLM",
    "checkpoint": "rlm_runtime.lms.checkpoint:CheckpointLM",
}


def resolve(spec: str | LM, **options: Any) -> LM:
    """The model `spec` names: "openai:MODEL" (any compatible endpoint, with base_url=), "anthropic:MODEL",
    "checkpoint:PATH"; a model itself is returned as it is.

    Args:
      options: of the provider's class; those that are None are left to its defaults.
    Raises:
      UsageError: an unknown provider or option (the valid ones are named), a missing key, no such checkpoint.
    """
    options = {k: v for k, v in options.items() if v is not None}
    if not isinstance(spec, str):
        if not isinstance(spec, LM):
            raise UsageError(f'a model is a name like "openai:gpt-5-mini" or an LM object, got {type(spec).__name__}.')
        if options:
            raise UsageError(f"{spec.name} is a model already: give it {', '.join(options)} where it is made.")
        return spec
    provider, colon, model = spec.partition(":")
    if provider not in PROVIDERS or not model:
        names = ", ".join(f"{p}:{'PATH' if p == 'checkpoint' else 'MODEL'}" for p in PROVIDERS)
        near = difflib.get_close_matches(provider, PROVIDERS, 1)
        said = f" Did you mean {near[0]}:{model or 'MODEL'}?" if near and colon else ""
        raise UsageError(
            f"unknown model {spec!r}.{said} Known: {names}. Another server's model: openai:MODEL with base_url."
        )
    module, _, name = PROVIDERS[provider].partition(":")
    made = getattr(importlib.import_module(module), name)
    allowed = _options(made)
    for option in options:
        if option not in allowed:
            near = difflib.get_close_matches(option, allowed, 1)
            said = f" Did you mean {near[0]}?" if near else f" It takes {', '.join(sorted(allowed))}."
            raise UsageError(f"{spec}: no such option: {option}.{said}")
    return made(model, **options)


def _options(made: type) -> set[str]:
    """Keyword arguments of a provider's class; those it passes on to its endpoint included."""
    names: set[str] = set()
    for parameter in list(inspect.signature(made).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            from rlm_runtime.lms.http import Endpoint

            passed = inspect.signature(Endpoint).parameters.values()
            names |= {p.name for p in passed if p.kind is p.KEYWORD_ONLY} - {"secrets", "hint"}
        else:
            names.add(parameter.name)
    return names

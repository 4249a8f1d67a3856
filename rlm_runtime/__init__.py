"""Recursive Language Models: the prompt is a variable in a sandboxed Python REPL, over any language
model.

    from rlm_runtime import RLM
    result = RLM("openai:gpt-5-mini").completion(Path("book.txt"), "Who betrays whom?")

Public names are imported when they are first used, so that importing the package costs next to
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlm_runtime.budget import Budget
    from rlm_runtime.context import Context
    from rlm_runtime.errors import (
        BudgetExceeded,
        Cancelled,
        ContextError,
        LMError,
        RlmError,
        SandboxError,
        UsageError,
    )
    from rlm_runtime.lms import register, resolve
    from rlm_runtime.lms.base import LM, Message, Reply, Sampling, Usage
    from rlm_runtime.lms.function import FunctionLM
    from rlm_runtime.lms.named import load_models
    from rlm_runtime.mcp import MCPTools
    from rlm_runtime.repl.base import Limits
    from rlm_runtime.rlm import RLM, RLMResult, Run, Session
    from rlm_runtime.tools import Tool

_WHERE = {
    "rlm": ("RLM", "RLMResult", "Run", "Session"),
    "budget": ("Budget",),
    "tools": ("Tool",),
    "context": ("Context",),
    "repl.base": ("Limits",),
    "lms": ("register", "resolve"),
    "lms.function": ("FunctionLM",),
    "lms.named": ("load_models",),
    "mcp": ("MCPTools",),
    "lms.base": ("LM", "Message", "Reply", "Sampling", "Usage"),
    "errors": (
        "BudgetExceeded",
        "Cancelled",
        "ContextError",
        "LMError",
        "RlmError",
        "SandboxError",
        "UsageError",
    ),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}

__version__ = "0.2.0"
__all__ = [
    "LM",
    "RLM",
    "Budget",
    "BudgetExceeded",
    "Cancelled",
    "Context",
    "ContextError",
    "FunctionLM",
    "LMError",
    "Limits",
    "MCPTools",
    "Message",
    "RLMResult",
    "Reply",
    "RlmError",
    "Run",
    "Sampling",
    "SandboxError",
    "Session",
    "Tool",
    "Usage",
    "UsageError",
    "load_models",
    "register",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

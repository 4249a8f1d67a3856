"""Every word the runtime says to a model. Pure functions of plain arguments.

`system` and `first_user` are the stable prefix of a conversation; everything later is appended.
Nothing here holds text of the context beyond the preview it is given, nor times or token counts
that would differ from run to run.
"""

from types import ModuleType

from rlm_runtime.prompts import messages, native
from rlm_runtime.prompts.messages import (
    ONE_REPLY,
    answer_refused,
    cell_report,
    compacted,
    compacted_before,
    compaction,
    empty_answer,
    first_user,
    last_call,
    next_context,
    nudged,
    plan_not_answer,
    prompt_was_cut,
    remaining,
    sub_system,
    sub_user,
    turn,
)
from rlm_runtime.prompts.system import VARIANTS, Helpers, fitting_chars, system, variant_for
from rlm_runtime.prompts.tools import describe_function, describe_tools

VERSION = "1"  # recorded in trajectories; raised when a text changes what models do

__all__ = [
    "ONE_REPLY",
    "VARIANTS",
    "VERSION",
    "Helpers",
    "answer_refused",
    "cell_report",
    "compacted",
    "compacted_before",
    "compaction",
    "describe_function",
    "describe_tools",
    "empty_answer",
    "first_user",
    "fitting_chars",
    "last_call",
    "next_context",
    "nudged",
    "plan_not_answer",
    "prompt_was_cut",
    "remaining",
    "sub_system",
    "sub_user",
    "system",
    "turn",
    "variant_for",
    "words_of",
]


def words_of(variant: str) -> ModuleType:
    """The module that words the task, turns and reports (`first_user`, `next_context`,
    `cell_report`, `turn`)."""
    return native if variant == "native" else messages

"""Opening a node: its system prompt, its task, and, for a child RLM, its REPL and what its parent
gets of it."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_jsonable_python

from rlm_runtime import prompts
from rlm_runtime.context import Context
from rlm_runtime.repl.base import Outcome
from rlm_runtime.rlm.conversation import Conversation
from rlm_runtime.rlm.history import History
from rlm_runtime.rlm.loop import Node
from rlm_runtime.rlm.results import ANSWERED, CANCELLED, ERROR, Ending
from rlm_runtime.rlm.subcalls import as_text
from rlm_runtime.rlm.tree import Meter, why_not
from rlm_runtime.structured import Shape


def system_prompt(node: Node) -> str:
    """The system prompt of this node: it depends on what is in the node's REPL, and is the same for
    the whole run."""
    options, depth = node.tree.options, node.depth
    limits = options.limits_for(node.lm)
    helpers = prompts.Helpers(
        sub_calls=options.max_depth > 0,
        children=depth + 1 < options.max_depth,
        sub_window=options.window_of(options.call_lm(depth + 1)),
        models=tuple(sorted(options.models)),
        concurrency=options.concurrency,
        output_chars=limits.output_chars,
        cell_seconds=limits.cell_seconds,
        tools=tuple(t.info() for t in node.tools.values()),
        packages=options.packages,
    )
    return prompts.system(
        helpers,
        variant=options.variant_of(node.lm),
        schema=node.shape.schema if node.shape is not None else None,
        custom=options.system_prompt if node.is_root else None,
    )


def open_task(node: Node, context: Context, name: str = "context") -> None:
    """Put the task before the model: with the system prompt in a new history, or as a session's
    next task."""
    words = node.words
    if node.native:
        about = context.brief()
    else:
        about = context.describe(min(2000, node.tree.options.limits_for(node.lm).output_chars // 4))
    budget, tips = node.tree.options.budget, node.tree.options.tips if node.is_root else None
    if not node.history.messages:
        node.history = History(system_prompt(node))
        task = words.first_user(
            node.question, about, budget=budget.model_dump(exclude={"turns"}), tips=tips
        )
    else:
        task = words.next_context(node.question, about, name)
        if node.shape is not None:  # the system prompt is the first task's
            task += f"\n\n{node.shape.describe()}"
    node.history.open("\n\n".join(filter(None, (task, words.turn(1, budget.turns)))))


async def spawn(
    parent: Conversation,
    id: str,
    meter: Meter,
    prompt: Any,
    question: str | None,
    shape: Shape | None,
) -> Outcome:
    """Run a child RLM to its end. Raises RlmError where it cannot even begin."""
    tree, depth = parent.tree, parent.depth + 1
    options = tree.options
    lm = options.node_lm(depth)
    context = Context.of(prompt if isinstance(prompt, str | list | dict) else as_text(prompt))
    async with tree.repl(depth, lambda: options.environment_for(depth)) as environment:
        node = Node(
            tree,
            environment,
            spawn,
            id=id,
            depth=depth,
            lm=lm,
            tools=options.sub_tools,
            meter=meter,
            question=question,
            shape=shape,
        )
        await node.start(context)
        open_task(node, context)
        return _told(await node.run())


def _told(ending: Ending) -> Outcome:
    """A child that was stopped still answers where it has something; its parent gets an error only
    where it has not."""
    failed = ending.reason in (ERROR, CANCELLED)
    if ending.reason == ANSWERED or (ending.answer is not None and not failed):
        return Outcome(value=to_jsonable_python(ending.answer))
    if ending.cause is not None:
        message, kind = why_not(ending.cause)
        return Outcome(error=f"the child RLM failed: {message}", kind=kind)
    limit = ending.reason.removeprefix("budget:")
    kind = "budget" if limit != ending.reason or ending.reason == "turns" else ending.reason
    best = f" Its best so far: {ending.text[:2000]}" if ending.text else ""
    return Outcome(
        error=f"the child RLM ended without an answer ({ending.reason}): {ending.error or ''}{best}",
        kind=kind,
    )

"""From chat messages to what an RLM takes: a context and a question.

The rule, which docs/rlm.md states for users:

1. The **question** is the last text part of the last user message; `rlm.question` overrides it.
   System and developer messages go before it as instructions.
2. The **context** is the files, if any are attached (parts of type `file` or `input_file`, or
   `rlm.context_file_ids`): one file is the context itself; several, or files next to earlier
   messages, are a folder, which then also holds `conversation.json`.
3. Without files: if there is one user message and nothing from an assistant, its text parts before
   the last are the context, as text. If there is only one part and it is longer than
   `question_chars`, that part is the context.
4. Otherwise the context is the list of all messages.

A question or instruction longer than `question_chars` is shown by its beginning and its end, and
the root is told where the whole of it is.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlm_runtime.context import Context
from rlm_runtime.serve.http.errors import refuse
from rlm_runtime.serve.http.files import safe_name
from rlm_runtime.serve.http.schemas import RefusalPart, TextPart
from rlm_runtime.serve.rlm.schemas import (
    ChatMessage,
    ChatRequest,
    FilePart,
    FileRef,
    ImagePart,
    InputFilePart,
)

GAP = "\n\n"


@dataclass(frozen=True)
class Task:
    """What the RLM is run on."""

    context: Context
    question: str


def build(
    request: ChatRequest,
    *,
    folder: Path,
    find: Callable[[str], tuple[Path, str]],
    question_chars: int = 8_000,
) -> Task:
    """The task a request asks for.

    Args:
      folder: a private folder of this request, for files that come with it.
      find: path and name of an uploaded file by its id; raises ApiError where there is none.

    Raises ApiError (400) naming the message that cannot be used.
    """
    last = max((i for i, m in enumerate(request.messages) if m.role == "user"), default=None)
    if last is None:
        raise refuse("There is no user message: the last one is the question.", "messages")
    texts = [_texts(m, i) for i, m in enumerate(request.messages)]
    files = _files(request, folder, find)
    options = request.rlm
    asked = options.question if options and options.question else None
    question = asked or (texts[last][-1] if texts[last] else "")
    if not question.strip() and not files:
        raise refuse(
            f"messages.{last} has no text: the last user message is the question.",
            f"messages.{last}.content",
        )
    question = question if question.strip() else "Answer what the context asks."
    instructions = GAP.join(
        GAP.join(t)
        for m, t in zip(request.messages, texts, strict=True)
        if m.role in ("system", "developer")
    ).strip()
    others = [
        i
        for i, m in enumerate(request.messages)
        if m.role not in ("system", "developer") and i != last
    ]

    alone = not others and len(instructions) <= question_chars  # one user message holds everything
    parts = texts[last]
    where = "`context`"
    if files:
        if len(files) == 1 and alone and len(parts) <= 1 and len(question) <= question_chars:
            context = _text(next(iter(files.values())))
        else:
            context = _gather(files, _plain(request, texts), folder)
            where = "the file conversation.json of `context`"
    elif alone and len(parts) > 1 and not asked and len(question) <= question_chars:
        context = Context("str", GAP.join(parts[:-1]))
    elif alone and parts and (asked or len(question) > question_chars):
        context = Context("str", GAP.join(parts))
    else:
        context = Context("messages", _plain(request, texts))

    shown = _shown(question, question_chars, "the user's message", where)
    if instructions:
        shown = _shown(instructions, question_chars, "the instructions", where) + GAP + shown
    return Task(context, shown)


def _shown(text: str, limit: int, what: str, where: str) -> str:
    if len(text) <= limit:
        return text
    half = min(1_500, limit // 2)
    return (
        f"[{what[0].upper()}{what[1:]} has {len(text):,} characters, too long to show; all of it is in {where}. "
        f"What is asked stands most likely at its beginning or its end.]\nIt begins:\n{text[:half]}\n"
        f"[...]\nIt ends:\n{text[-half:]}"
    )


def _texts(message: ChatMessage, index: int) -> list[str]:
    """The text parts of a message that are not empty."""
    if message.content is None or isinstance(message.content, str):
        return [message.content] if message.content else []
    texts = []
    for k, part in enumerate(message.content):
        if isinstance(part, ImagePart):
            raise refuse(
                f"messages.{index}.content.{k}: parts of type {part.type} are not supported; send text or files.",
                f"messages.{index}.content.{k}",
                "unsupported_value",
            )
        text = (
            part.text
            if isinstance(part, TextPart)
            else part.refusal
            if isinstance(part, RefusalPart)
            else ""
        )
        if text:
            texts.append(text)
    return texts


def _plain(request: ChatRequest, texts: Sequence[list[str]]) -> list[dict[str, Any]]:
    """The messages as plain data, as the REPL holds them."""
    messages = []
    for message, parts in zip(request.messages, texts, strict=True):
        plain: dict[str, Any] = {"role": message.role, "content": GAP.join(parts)}
        if message.name:
            plain["name"] = message.name
        if message.tool_calls:
            plain["tool_calls"] = [
                {"name": c.function.name, "arguments": c.function.arguments}
                for c in message.tool_calls
            ]
        messages.append(plain)
    return messages


def _files(
    request: ChatRequest, folder: Path, find: Callable[[str], tuple[Path, str]]
) -> dict[str, Path]:
    """Name -> path of every attached file, in order; names made unique."""
    refs: list[tuple[str, FileRef]] = []
    for i, message in enumerate(request.messages):
        for k, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, FilePart):
                refs.append((f"messages.{i}.content.{k}.file", part.file))
            elif isinstance(part, InputFilePart):
                refs.append((f"messages.{i}.content.{k}", part))
    for k, file_id in enumerate((request.rlm.context_file_ids if request.rlm else None) or ()):
        refs.append((f"rlm.context_file_ids.{k}", FileRef(file_id=file_id)))
    files: dict[str, Path] = {}
    for place, ref in refs:
        if (ref.file_id is None) == (ref.file_data is None):
            raise refuse(f"{place}: give either file_id or file_data.", place)
        if ref.file_id is not None:
            path, name = find(ref.file_id)
        else:
            name = safe_name(ref.filename or f"file{len(files) + 1}.txt")
            path = folder / f"inline{len(files)}" / name
            path.parent.mkdir(parents=True, mode=0o700)
            path.write_bytes(_decode(ref.file_data or "", place))
        files[_unique(safe_name(name), files)] = path
    return files


def _decode(data: str, place: str) -> bytes:
    if data.startswith("data:"):
        head, _, data = data.partition(",")
        if not head.endswith(";base64"):
            raise refuse(f"{place}.file_data: a data URL must be base64.", f"{place}.file_data")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise refuse(f"{place}.file_data is not base64.", f"{place}.file_data") from None


def _gather(files: dict[str, Path], messages: list[dict[str, Any]], folder: Path) -> Context:
    """A folder object over the files where they are, and the conversation."""
    if any(m["content"] for m in messages):
        name = _unique("conversation.json", files)
        path = folder / "conversation.json"
        path.write_text(json.dumps(messages, ensure_ascii=False, indent=1), encoding="utf-8")
        files = {**files, name: path}
    for path in files.values():
        _text(path)
    return Context.several(files)


def _text(path: Path) -> Context:
    """Raises ContextError for what is empty or no text, ApiError for what would have to be
    unpacked."""
    context = Context.of(path)
    if context.compression:
        raise refuse(
            f"{path.name} is compressed; upload the text itself.", "file", "unsupported_file"
        )
    return context


def _unique(name: str, taken: dict[str, Any]) -> str:
    stem, dot, ending = name.rpartition(".")
    k = 2
    fresh = name
    while fresh in taken:
        fresh = f"{stem}_{k}{dot}{ending}" if stem else f"{name}_{k}"
        k += 1
    return fresh

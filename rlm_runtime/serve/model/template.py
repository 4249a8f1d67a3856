"""Chat messages as a prompt: by the template of the checkpoint's tokenizer, else by a plain one.

A template is Jinja and comes with the weights, so it runs in Jinja's immutable sandbox. The spelling of a special
token (`<|im_end|>`) is that token where the template wrote it, and ordinary text where a message has it: nobody can
forge a turn.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlm_runtime.errors import UsageError
from rlm_runtime.serve.errors import ApiError, refuse

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PLAIN_STOPS = ("\nsystem:", "\nuser:", "\nassistant:")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
MARK = "\ufdd0"  # a noncharacter; breaks the spelling of special tokens inside messages
LONGEST = 4 << 20  # characters a template may come to


class ChatTemplate:
    """`source`: Jinja, or None for the plain one (`role: text` paragraphs, for models trained on text alone).

    `stops` are strings that end a reply; under the plain template those that begin another speaker's line. The plain
    template puts the document start before the prompt; one of the checkpoint's writes it where it wants it.
    Raises UsageError: no valid Jinja.
    """

    def __init__(self, source: str | None = None):
        self.plain = source is None
        self.source = PLAIN if source is None else source
        self.stops: tuple[str, ...] = PLAIN_STOPS if self.plain else ()
        try:
            self._template = _environment().from_string(self.source)
        except jinja2.TemplateError as e:
            raise UsageError(f"The chat template is no valid Jinja: {e}.") from e

    def ids(
        self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, opened: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """Token ids of the prompt. `opened`: the model's turn is begun. Raises ApiError (400) from the template."""
        specials = special_tokens(tokenizer)
        text = self.text(tokenizer, [_broken(m, specials) for m in messages], opened=opened, options=options)
        ids = [tokenizer.bos] if self.plain else []
        for piece in _split(text, specials):
            if piece in specials:
                ids.append(specials[piece])
            elif piece:
                ids += tokenizer.encode(piece.replace(MARK, ""))
        return ids or [tokenizer.bos]

    def text(
        self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, opened: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        names = {"bos_token": tokenizer.token_text(tokenizer.bos), "eos_token": tokenizer.token_text(tokenizer.eos)}
        values = {**(options or {}), **names, "messages": list(messages), "add_generation_prompt": opened}
        parts, size = [], 0
        try:
            for part in self._template.generate(values):
                parts.append(part)
                size += len(part)
                if size > LONGEST:
                    raise refuse("The chat template makes too much text of these messages.", "messages")
        except ApiError:
            raise
        except Exception as e:  # the template's own raise_exception, undefined names, the sandbox, a bad option
            raise refuse(f"The chat template cannot be applied to these messages: {str(e)[:300]}.", "messages") from e
        return "".join(parts)

    def stop_tokens(self, tokenizer: Any) -> frozenset[int]:
        """End of document, and under a template of its own the tokens that close a turn."""
        specials = special_tokens(tokenizer)
        ends = () if self.plain else TURN_ENDS
        return frozenset({tokenizer.eos, *(specials[name] for name in ends if name in specials)})


@functools.lru_cache(maxsize=16)
def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Spelling -> id of the tokens that stand for no text."""
    names = {i: tokenizer.token_text(i) for i in range(tokenizer.vocab_size) if not tokenizer.piece(i)}
    return {name: i for i, name in names.items() if name}


def _broken(message: Mapping[str, Any], specials: Mapping[str, int]) -> dict[str, Any]:
    """The message with every special spelling in it broken by a mark."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            value = value.replace(MARK, "")
            for name in specials:
                if name in value:
                    value = value.replace(name, MARK.join(name))
            return value
        if isinstance(value, Mapping):
            return {k: walk(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [walk(v) for v in value]
        return value

    return {k: v if k == "role" else walk(v) for k, v in message.items()}


def _split(text: str, specials: Mapping[str, int]) -> list[str]:
    if not specials:
        return [text]
    longest_first = sorted(specials, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    return env


def find_template(directory: str | os.PathLike[str], tokenizer_json: str = "{}") -> ChatTemplate:
    """The template that a checkpoint carries, else the plain one.

    Looked for in `directory`/chat_template.jinja, then under "chat_template" in `directory`/tokenizer_config.json and
    in the tokenizer's own JSON. Raises UsageError: one that cannot be read, or is no Jinja.
    """
    folder = directory if hasattr(directory, "is_file") else Path(directory)  # also one of an object store
    try:
        if (folder / "chat_template.jinja").is_file():
            return ChatTemplate((folder / "chat_template.jinja").read_text(encoding="utf-8"))
        texts = [tokenizer_json]
        if (folder / "tokenizer_config.json").is_file():
            texts.insert(0, (folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        found = [json.loads(text) for text in texts]
    except (OSError, ValueError) as e:
        raise UsageError(f"{folder}: the chat template cannot be read ({e}).") from e
    for config in found:
        source = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(source, list):  # several, by name
            source = next((t.get("template") for t in source if t.get("name") == "default"), None)
        if isinstance(source, str):
            return ChatTemplate(source)
    return ChatTemplate()

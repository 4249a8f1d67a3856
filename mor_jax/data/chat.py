"""Chat messages as tokens: prompts for a served model, and training samples with loss weights.

A template is Jinja and comes with the weights, so it runs in Jinja's immutable sandbox. The
spelling of a special token (`<|im_end|>`) is that token where the template wrote it, and ordinary
text where a message has it: nobody can forge a turn. Serving, in-process language models and
training share this module, so a model is asked exactly what it was trained on.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils import epath
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import DataError
from mor_jax.paths import as_path, write_text

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PLAIN_STOPS = ("\nsystem:", "\nuser:", "\nassistant:")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
MARK = "\ufdd0"  # a noncharacter; breaks the spelling of special tokens inside messages
LONGEST = 4 << 20  # characters a template may come to
FILE = "chat_template.jinja"

Message = Mapping[str, Any]  # {"role": str, "content": str, ...}


class ChatError(DataError):
    """A template that cannot be applied to these messages."""


class Sample(NamedTuple):
    """A conversation to train on. Position t holds a token and the weight of the loss of predicting
    it."""

    ids: np.ndarray  # int32 [N]
    weights: np.ndarray  # float32 [N]


class ChatTemplate:
    """Messages to token ids.

    `source`: Jinja, or None for the plain one (`role: text` paragraphs, for models trained on text
    alone).

    `stops` are strings that end a reply; under the plain template those that begin another
    speaker's line. The plain template puts the document start before the prompt; one of the
    checkpoint's writes it where it wants it. Raises DataError: no valid Jinja.
    """

    def __init__(self, source: str | None = None):
        self.plain = source is None or source == PLAIN
        self.source = PLAIN if source is None else source
        self.stops: tuple[str, ...] = PLAIN_STOPS if self.plain else ()
        try:
            self._template = _environment().from_string(self.source)
        except jinja2.TemplateError as e:
            raise DataError(f"The chat template is no valid Jinja: {e}.") from e

    def ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        opened: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the prompt. `opened`: the model's turn is begun. Raises ChatError from the
        template."""
        start = tokenizer.start if self.plain else []
        text = self.text(tokenizer, messages, opened=opened, options=options)
        return [*start, *_encode(tokenizer, text)] or [tokenizer.bos]

    def text(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        opened: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """What the template writes, with `MARK` inside the spelling of special tokens that a
        message contains."""
        names = {
            "bos_token": tokenizer.token_text(tokenizer.bos),
            "eos_token": tokenizer.token_text(tokenizer.eos),
        }
        safe = [_broken(m, tokenizer.specials) for m in messages]
        values = {**(options or {}), **names, "messages": safe, "add_generation_prompt": opened}
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(values):
                parts.append(part)
                size += len(part)
                if size > LONGEST:
                    raise ChatError("The chat template makes too much text of these messages.")
        except ChatError:
            raise
        # the template's own raise_exception, undefined names, the sandbox, a bad option
        except Exception as e:
            raise ChatError(
                f"The chat template cannot be applied to these messages: {str(e)[:300]}."
            ) from e
        return "".join(parts)

    def save(self, directory: str | os.PathLike[str]) -> epath.Path:
        """Write `directory`/chat_template.jinja, which `find_template` reads; returns its path."""
        path = as_path(directory) / FILE
        write_text(path, self.source)
        return path

    def stop_tokens(self, tokenizer: Tokenizer) -> frozenset[int]:
        """What ends any text of the model, and under a template of its own the tokens that close a
        turn."""
        ends = () if self.plain else TURN_ENDS
        return frozenset(
            {*tokenizer.ends, *(tokenizer.specials[n] for n in ends if n in tokenizer.specials)}
        )

    def sample(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        roles: Sequence[str],
        limit: int = 0,
    ) -> Sample | None:
        """A conversation as tokens with loss weights.

        A message of one of `roles` has weight 1, any other 0; its own "weight" goes first. Weighted
        are the tokens of the message itself, what closes its turn, and under the plain template the
        next speaker's name, so that the model learns to stop; never the header that opens its turn,
        which the prompt of `ids` ends with. A message with "spans", pairs of a first and an end
        character, is weighted in these alone, by the tokens that lie in one as a whole.

        Args:
          limit: tokens; a longer conversation is cut after the last weighted message that fits. 0:
            none.
        Returns:
          None where no weighted message fits.
        Raises:
          ChatError: the template rewrites earlier messages as the conversation goes on, so that
            what a reply is trained on is not what it would be asked with; or it, or the tokenizer,
            does not keep the text of a message with "spans".
        """
        weights = [float(m.get("weight", 1.0 if m["role"] in roles else 0.0)) for m in messages]
        ids = list(tokenizer.start) if self.plain else []
        of_token = [0.0] * len(ids)
        kept, done = 0, ""

        def extend(text: str, weight: float, message: Message | None = None) -> None:
            nonlocal done
            if not text.startswith(done):
                raise ChatError(
                    "The chat template writes earlier messages anew as the conversation goes on, so replies cannot be "
                    "trained in one row. Split the conversation after each reply, one sample a reply."
                )
            new = _encode(tokenizer, text[len(done) :])
            ids.extend(new)
            if message is None or "spans" not in message:
                of_token.extend([weight] * len(new))
            else:
                inside = _in_spans(tokenizer, new, text[len(done) :], message)
                of_token.extend(weight * i for i in inside)
            done = text

        for i, weight in enumerate(weights):
            if not weight:
                continue
            before, last = list(messages[:i]), i + 1 == len(messages)
            opened = messages[i]["role"] == "assistant"
            if before or opened:
                extend(self.text(tokenizer, before, opened=opened), 0.0)
            through = self.text(tokenizer, messages[: i + 1], opened=False)
            if self.plain and last:
                extend(through, weight, messages[i])
                ids.append(tokenizer.eos)
                of_token.append(0.0 if "spans" in messages[i] else weight)
            elif self.plain:  # up to and with the next speaker's name
                extend(f"{through}{messages[i + 1]['role']}:", weight, messages[i])
            else:
                extend(through, weight, messages[i])
            if limit and len(ids) > limit:
                break
            kept = len(ids)
        if not kept:
            return None
        return Sample(np.array(ids[:kept], np.int32), np.array(of_token[:kept], np.float32))

    def pair(
        self,
        tokenizer: Tokenizer,
        chosen: Sequence[Message],
        rejected: Sequence[Message],
        roles: Sequence[str],
        limit: int = 0,
    ) -> tuple[Sample, Sample] | None:
        """Two conversations that are compared: weights of the chosen one are positive, of the
        rejected one negative, and 0 in the messages that both begin with.

        Args:
          limit: tokens of both together.
        Returns:
          None where they do not fit, or one of them has no weighted message.
        Raises:
          ChatError: as of `sample`.
        """
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        found = []
        for messages in (chosen, rejected):
            own = [{**m, "weight": 0.0} if i < same else m for i, m in enumerate(messages)]
            found.append(self.sample(tokenizer, own, roles))
        one, other = found
        if one is None or other is None or (limit and len(one.ids) + len(other.ids) > limit):
            return None
        return one, other._replace(weights=-other.weights)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a template's text: spellings of special tokens are these tokens, except where `MARK`
    breaks them."""
    ids: list[int] = []
    for piece in _split(text, tokenizer.specials):
        if piece in tokenizer.specials:
            ids.append(tokenizer.specials[piece])
        elif piece:
            ids += tokenizer.encode(piece.replace(MARK, ""))
    return ids


def _in_spans(tokenizer: Tokenizer, ids: Sequence[int], text: str, message: Message) -> list[bool]:
    """Whether each token of `text` lies in one of the message's "spans"."""
    names = {i: name for name, i in tokenizer.specials.items()}
    pieces = [names[i].encode() if i in names else tokenizer.pieces[i] for i in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    content = message["content"]
    at = text.find(content)
    if at < 0 or b"".join(pieces) != text.encode():
        raise ChatError(
            'A message with "spans" needs a chat template and a tokenizer that keep its text as it is.'
        )
    spans = [
        [len((text[:at] + content[:edge]).encode()) for edge in span] for span in message["spans"]
    ]
    return [
        any(first <= end - len(piece) and end <= last for first, last in spans)
        for end, piece in zip(ends, pieces, strict=True)
    ]


def _broken(message: Message, specials: Mapping[str, int]) -> dict[str, Any]:
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
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    return env


def find_template(directory: str | os.PathLike[str], tokenizer_json: str = "{}") -> ChatTemplate:
    """The template that a checkpoint or tokenizer carries, else the plain one.

    Looked for in `directory`/chat_template.jinja, then under "chat_template" in
    `directory`/tokenizer_config.json and in the tokenizer's own JSON. Raises DataError: one that
    cannot be read, or is no Jinja.
    """
    folder = as_path(directory)
    try:
        if (folder / FILE).is_file():
            return ChatTemplate((folder / FILE).read_text(encoding="utf-8"))
        texts = [tokenizer_json]
        if (folder / "tokenizer_config.json").is_file():
            texts.insert(0, (folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        found = [json.loads(text) for text in texts]
    except (OSError, ValueError) as e:
        raise DataError(f"{folder}: the chat template cannot be read ({e}).") from e
    for config in found:
        source = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(source, list):  # several, by name
            source = next((t.get("template") for t in source if t.get("name") == "default"), None)
        if isinstance(source, str):
            return ChatTemplate(source)
    return ChatTemplate()


def build_template(
    name: str, tokenizer: Tokenizer, directory: str | os.PathLike[str] = ""
) -> ChatTemplate:
    """The template that `config.data.chat_template` names: plain | chatml | path of a Jinja file |
    "".

    "" is the one found beside the tokenizer in `directory`, else the plain one.
    Raises DataError: a file that cannot be read, or ChatML without its two special tokens."""
    where = f"config.data.chat_template = {name!r}"
    if name == "plain":
        return ChatTemplate()
    if name == "chatml":
        missing = [token for token in CHATML_TOKENS if token not in tokenizer.specials]
        if missing:
            raise DataError(
                f"{where} needs the special tokens {' and '.join(missing)}, which the tokenizer does not have. Use "
                "config.data.tokenizer = 'bpe' (which adds them) or a tokenizer.json that has them, or the plain template."
            )
        return ChatTemplate(CHATML)
    if name:
        try:
            return ChatTemplate(as_path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(
                f"{where} is neither plain, chatml nor a file that can be read ({e})."
            ) from e
    if not directory:
        return ChatTemplate()
    folder = as_path(directory)
    return find_template(folder.parent if folder.is_file() else folder, tokenizer.to_json())


PAIR = (
    "prompt",
    "chosen",
    "rejected",
)  # fields of a record of preferences; the first may be missing


def pair_text(record: Mapping[str, Any], where: str) -> str:
    """{"chosen": messages, "rejected": messages} as JSON, of one record of preferences.

    Each side is a list of messages or the text of a reply; "prompt", messages or the text of a
    user, comes before both. Raises DataError naming the place and what is wrong."""
    prompt = record.get("prompt") or []
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(before, list):
        raise DataError(f"{where}: prompt must be a text or messages, got {_short(before)}.")
    found = {}
    for side in PAIR[1:]:
        if side not in record:
            raise DataError(
                f"{where}: no field {side!r}. A record of preferences has chosen and rejected, and may have prompt; "
                f"fields present: {', '.join(map(repr, record)) or 'none'}."
            )
        value = record[side]
        if isinstance(value, str):
            value = [{"role": "assistant", "content": value}]
        if not isinstance(value, list):
            raise DataError(f"{where}, {side}: expected a text or messages, got {_short(value)}.")
        found[side] = json.loads(conversation_text([*before, *value], f"{where}, {side}"))
        if any(m.get("weight", 1.0) < 0 for m in found[side]):
            raise DataError(
                f"{where}, {side}: a weight below 0; which side is better is said by the fields."
            )
    return json.dumps(found, ensure_ascii=False)


def conversation_text(value: Any, where: str) -> str:
    """The messages of one record as JSON, what a conversation is as a `Document`.

    Raises DataError naming the place and what is wrong."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: expected a list of messages with role and content, got {_short(value)}."
        )
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(
                f"{where}: message {i} must be an object with role and content, got {_short(message)}."
            )
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise DataError(
                    f"{where}: message {i} has no text under {name!r}: {_short(message)}."
                )
        weight = message.get("weight", 1.0)
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not np.isfinite(weight)
        ):
            raise DataError(
                f"{where}: the weight of message {i} must be a finite number, got {_short(weight)}."
            )
        if not _are_spans(message.get("spans", []), len(message["content"])):
            raise DataError(
                f"{where}: the spans of message {i} must be a list of pairs of a first and an end character of its "
                f"content, got {_short(message['spans'])}."
            )
    messages = [{k: v for k, v in message.items() if v is not None} for message in value]
    return json.dumps(messages, ensure_ascii=False)


def _are_spans(value: object, length: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(span, list)
        and len(span) == 2
        and all(type(edge) is int for edge in span)
        and 0 <= span[0] <= span[1] <= length
        for span in value
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

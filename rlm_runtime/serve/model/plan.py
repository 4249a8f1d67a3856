"""Turns a request into engine requests, and validates its fields; errors name the field."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlm_runtime.serve.http.errors import ApiError, refuse
from rlm_runtime.serve.http.schemas import SchemaFormat, TextPart
from rlm_runtime.serve.model.backend import Grammars, ModelBackend
from rlm_runtime.serve.model.schemas import (
    ChatRequest,
    CompletionRequest,
    Drawn,
    ImagePart,
    ModelMessage,
)
from rlm_runtime.serve.model.settings import ModelSettings

DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI has it; a chat reply may fill the window
SEEDS = 2**31


@dataclass(frozen=True)
class Wanted:
    """One sequence: what the engine is given, and what is done with its tokens on this side."""

    request: Any
    prompt_index: int


@dataclass(frozen=True)
class RequestPlan:
    """A request that was understood.

    `sequences` holds `best_of` sequences for each prompt, prompt by prompt; `n` of them are shown.
    `prompt_texts` is for `echo`. `scoring_only`: the one drawn token is thrown away (`max_tokens:
    0`).
    """

    model: ModelBackend
    sequences: list[Wanted]
    n: int
    best_of: int
    stops: tuple[str, ...]
    stream: bool
    usage_wanted: bool
    depths_wanted: bool
    logprobs: int | None  # alternatives to show
    strip: bool = False  # the space the plain template leaves to the model
    echo: bool = False
    scoring_only: bool = False
    prompts: list[list[int]] = field(default_factory=list)
    ignored: tuple[str, ...] = ()  # fields of the request that are not known here


def plan_completion(
    asked: CompletionRequest, model: ModelBackend, settings: ModelSettings
) -> RequestPlan:
    """Raises ApiError."""
    if asked.suffix:
        raise refuse(
            "suffix is not supported: the model writes on, it does not fill in.",
            "suffix",
            "unsupported_parameter",
        )
    n, best_of = asked.n or 1, asked.best_of or asked.n or 1
    if best_of < n:
        raise refuse(f"best_of must be at least n, got {best_of} and {n}.", "best_of")
    if best_of > n and asked.stream:
        raise refuse(
            "best_of above n cannot be streamed: which are best is known at the end.", "best_of"
        )
    prompts = _prompts(asked, model, settings)
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    scoring_only = max_tokens == 0
    if scoring_only and not asked.echo:
        raise refuse("max_tokens must be at least 1 (0 goes with echo: true).", "max_tokens")
    if scoring_only and asked.stream:
        raise refuse("There is nothing to stream with max_tokens 0.", "stream")
    for ids in prompts:
        _check_window(
            model,
            len(ids),
            max(1, max_tokens),
            asked.max_tokens is not None,
            "prompt",
            "max_tokens",
        )
    logprobs, scored = asked.logprobs, bool(asked.echo and asked.logprobs is not None)
    if best_of > n and logprobs is None:
        logprobs = 0  # best: the highest mean log-probability
    sequences = _sequences(
        asked,
        model,
        settings,
        prompts,
        best_of,
        "prompt",
        stop_tokens=model.tokenizer.ends,
        max_tokens=lambda ids: min(max(1, max_tokens), model.window - len(ids)),
        logprobs=logprobs,
        scored=scored,
    )
    return RequestPlan(
        model=model,
        sequences=sequences,
        n=n,
        best_of=best_of,
        stops=asked.stops,
        logprobs=asked.logprobs,
        echo=bool(asked.echo),
        scoring_only=scoring_only,
        prompts=prompts,
        **_ways(asked),
    )


def plan_chat(asked: ChatRequest, model: ModelBackend, settings: ModelSettings) -> RequestPlan:
    """Raises ApiError."""
    _check_chat(asked)
    ids = chat_ids(
        asked.messages, model, settings, asked.add_generation_prompt, asked.chat_template_kwargs
    )
    limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    _check_window(model, len(ids), limit or 1, limit is not None, "messages", name)
    template = model.template
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    best_of = asked.n or 1
    sequences = _sequences(
        asked,
        model,
        settings,
        [ids],
        best_of,
        "messages",
        stop_tokens=template.stop_tokens(model.tokenizer),
        max_tokens=lambda ids: limit or model.window - len(ids),
        logprobs=logprobs,
        scored=False,
    )
    return RequestPlan(
        model=model,
        sequences=sequences,
        n=best_of,
        best_of=best_of,
        stops=(*asked.stops, *template.stops),
        logprobs=logprobs,
        strip=template.plain,
        prompts=[ids],
        **_ways(asked),
    )


def chat_ids(
    messages: list[ModelMessage],
    model: ModelBackend,
    settings: ModelSettings,
    opened: bool | None,
    options: Mapping[str, Any] | None,
) -> list[int]:
    """The prompt of a conversation. Raises ApiError."""
    plain = [_message(m, i) for i, m in enumerate(messages)]
    _check_size(sum(len(m["content"]) for m in plain), settings, "messages")
    try:
        return model.template.ids(
            model.tokenizer, plain, opened=opened is not False, options=options
        )
    except model.engine_types.UserError as e:
        raise refuse(str(e), "messages") from e


# ---- prompts


def _prompts(
    asked: CompletionRequest, model: ModelBackend, settings: ModelSettings
) -> list[list[int]]:
    given, vocab = asked.prompt, model.tokenizer.vocab_size
    many: list[Any] = (
        [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    )
    _check_size(sum(len(p) for p in many if isinstance(p, str)), settings, "prompt")
    prompts = []
    for prompt in many:
        if isinstance(prompt, str):
            tokenizer = model.tokenizer
            ids = (
                tokenizer.encode(prompt)
                if asked.add_special_tokens is False
                else tokenizer.prompt(prompt)
            )
            if not ids:
                raise refuse("The prompt has no tokens.", "prompt")
        else:
            ids = list(prompt)
            if (worst := max(ids)) >= vocab:
                text = f"Token {worst} does not exist; this model's vocabulary has {vocab} tokens, 0 to {vocab - 1}."
                raise refuse(text, "prompt")
        prompts.append(ids)
    return prompts


def _message(message: ModelMessage, index: int) -> dict[str, Any]:
    where = f"messages.{index}"
    if message.tool_calls:
        raise refuse(
            "tool_calls are not supported: this model calls no tools.",
            f"{where}.tool_calls",
            "unsupported_parameter",
        )
    content = message.content or ""
    if not isinstance(content, str):
        texts = []
        for part in content:
            if isinstance(part, ImagePart):
                raise refuse(
                    f"This model reads text only, not {part.type}.",
                    f"{where}.content",
                    "unsupported_value",
                )
            texts.append(part.text if isinstance(part, TextPart) else part.refusal)
        content = "\n".join(texts)
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": content, **({"name": message.name} if message.name else {})}


def _check_size(chars: int, settings: ModelSettings, param: str) -> None:
    if chars > settings.max_prompt_chars:
        text = f"{param} has {chars:,} characters; the limit is {settings.max_prompt_chars:,}."
        raise ApiError(413, text, param=param, code="prompt_too_large")


def _check_window(
    model: ModelBackend, prompt: int, reply: int, asked: bool, param: str, reply_param: str
) -> None:
    if prompt >= model.window or (asked and prompt + reply > model.window):
        wish = f" and {reply:,} more in {reply_param}" if asked else ""
        text = (
            f"This model's maximum context length is {model.window:,} tokens, prompt and reply together; the request "
            f"has {prompt:,} tokens in {param}{wish}. Shorten one of them."
        )
        raise refuse(
            text, param if prompt >= model.window else reply_param, "context_length_exceeded"
        )


# ---- sequences


def _sequences(
    asked: Drawn,
    model: ModelBackend,
    settings: ModelSettings,
    prompts: list[list[int]],
    best_of: int,
    param: str,
    *,
    stop_tokens: frozenset[int],
    max_tokens: Callable[[list[int]], int],
    logprobs: int | None,
    scored: bool,
) -> list[Wanted]:
    count = len(prompts) * best_of
    if count > settings.max_sequences:
        text = f"The request asks for {count:,} sequences; one request may have {settings.max_sequences:,}."
        raise refuse(text, param if len(prompts) > settings.max_sequences else "n")
    types, vocab = model.engine_types, model.tokenizer.vocab_size
    stop_tokens = frozenset() if asked.ignore_eos else stop_tokens
    extra = asked.stop_token_ids or []
    bias = tuple((int(token), value) for token, value in (asked.logit_bias or {}).items())
    for field_name, ids in (
        ("stop_token_ids", extra),
        ("logit_bias", [token for token, _ in bias]),
    ):
        if any(token >= vocab for token in ids):
            raise refuse(
                f"{field_name} names a token that does not exist; there are {vocab}.", field_name
            )
    first = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed
    deadline = min(asked.deadline or math.inf, settings.request_seconds)
    make_grammar = _grammar(asked, model)
    wanted = []
    try:
        depth = types.DepthWish(mean=asked.mean_depth, least=asked.min_depth, most=asked.max_depth)
        for index, ids in enumerate(prompts):
            for copy in range(best_of):
                drawing = types.Drawing(
                    temperature=_or(asked.temperature, 1.0),
                    top_k=max(0, asked.top_k or 0),
                    top_p=_or(asked.top_p, 1.0),
                    min_p=asked.min_p or 0.0,
                    presence_penalty=asked.presence_penalty or 0.0,
                    frequency_penalty=asked.frequency_penalty or 0.0,
                    logit_bias=bias,
                    repetition_penalty=_or(asked.repetition_penalty, 1.0),
                    seed=(first + copy) % SEEDS,
                )
                request = types.Request(
                    prompt=tuple(ids),
                    max_tokens=max_tokens(ids),
                    drawing=drawing,
                    min_tokens=asked.min_tokens or 0,
                    stop_tokens=stop_tokens | frozenset(extra),
                    logprobs=logprobs,
                    prompt_logprobs=scored,
                    grammar=make_grammar() if make_grammar else None,
                    depth=depth,
                    priority=asked.priority or 0,
                    deadline_s=deadline,
                )
                wanted.append(Wanted(request, index))
    except types.UserError as error:
        raise refuse(str(error)) from error
    return wanted


def _grammar(asked: Drawn, model: ModelBackend) -> Callable[[], Any] | None:
    """Makes the constraint of each sequence; None: unconstrained."""
    form = asked.response_format
    wanted: dict[str, Callable[[Grammars], Any]] = {}
    if form is not None and form.type != "text":
        schema = form.json_schema.schema_ if isinstance(form, SchemaFormat) else None
        wanted["response_format"] = lambda g: (
            g.json_object() if schema is None else g.json_schema(schema)
        )
    if (guide := asked.guided_json) is not None:
        wanted["guided_json"] = lambda g: g.json_schema(guide)
    if (pattern := asked.guided_regex) is not None:
        wanted["guided_regex"] = lambda g: g.regex(pattern)
    if (options := asked.guided_choice) is not None:
        wanted["guided_choice"] = lambda g: g.choice(options)
    if not wanted:
        return None
    name, *more = wanted
    if more:
        raise refuse(f"Only one constraint can be given, got {' and '.join(wanted)}.", more[0])
    grammars, make = model.grammars, wanted[name]
    if grammars is None:
        raise refuse(model.no_grammars, name, "unsupported_parameter")

    def guarded() -> Any:
        try:
            return make(grammars)
        except model.engine_types.UserError as error:
            raise refuse(str(error)[:2_000], name, "invalid_schema") from error

    return guarded


# ---- fields


def _check_chat(asked: ChatRequest) -> None:
    asked.check_text_only(
        "are not supported: this model calls no tools.", "this model calls no tools."
    )
    if asked.top_logprobs is not None and not asked.logprobs:
        raise refuse("top_logprobs needs logprobs: true.", "top_logprobs")


def _ways(asked: Drawn) -> dict[str, Any]:
    asked.check_stream()
    return {
        "stream": bool(asked.stream),
        "usage_wanted": asked.usage_wanted,
        "depths_wanted": bool(asked.return_depths),
    }


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value

"""What goes over the wire of a model server: OpenAI's completion and chat objects, and our
extensions.

Extensions of a request are the fields that other model servers have too (`top_k`, `min_p`, ...) and
those of recursion (`mean_depth`, `return_depths`, ...); those of a reply stand under the key `mor`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from rlm_runtime.serve.http.schemas import (
    NOTHING,
    ChatFields,
    GenerationRequest,
    ModelOut,
    Name,
    Out,
    RefusalPart,
    TextPart,
    Wire,
)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]


# ---- requests


class Drawn(GenerationRequest):
    """How tokens are drawn, and when they end: the fields both endpoints share."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=300),
        ]
        | None
    ) = None

    # As other model servers have them.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # 0 and -1: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=15)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # lower runs earlier
    guided_json: dict[str, Any] | None = None
    guided_regex: Annotated[str, Field(min_length=1, max_length=10_000)] | None = None
    guided_choice: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1_000)]
        | None
    ) = None

    # Ours.
    mean_depth: Annotated[float, Field(ge=0, le=1_000)] | None = None
    min_depth: Annotated[int, Field(ge=0, le=1_000)] | None = None
    max_depth: Annotated[int, Field(ge=1, le=1_000)] | None = None
    return_depths: bool | None = None  # recursions of each token, under `mor` of its choice
    # seconds; what there is by then is the reply
    deadline: Annotated[float, Field(gt=0, le=1e6)] | None = None


class CompletionRequest(Drawn):
    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=10_000)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=10_000)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # 0 only with `echo`
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Annotated[str | None, WithJsonSchema({"enum": ["", None]})] = None  # refused by name
    # the document start before a prompt given as text; default yes
    add_special_tokens: bool | None = None


class ImagePart(Wire):
    """Known so that it can be refused by name."""

    type: Literal["image_url", "input_image", "input_audio", "file"]


Part = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]


class ModelMessage(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=10_000)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[Any] | None, WithJsonSchema(NOTHING)] = None  # refused by name
    tool_call_id: Name | None = None


Messages = Annotated[list[ModelMessage], Field(min_length=1, max_length=100_000)]
TemplateOptions = Annotated[dict[str, Any], Field(max_length=64)]


class ChatRequest(Drawn, ChatFields):
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None  # begin the model's turn; default yes


class TokenizeRequest(Wire):
    """Either a text or messages."""

    model: Name | None = None  # may be left out where there is one model
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Wire):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


# ---- replies


class CachedTokens(Out):
    cached_tokens: int = 0


class RunNotes(Out):
    """How the engine went about it: `mean_depth` is over computed prompt tokens and drawn tokens;
    `ignored` are the fields of the request that this server does not know."""

    mean_depth: float | None
    queued_seconds: float
    preempted: int
    ignored: list[str] = Field(default_factory=list)


class ModelUsage(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    mor: RunNotes


class ChoiceNotes(Out):
    """`ended` says more than finish_reason may: stop, length, deadline. `depths`: recursions of
    each drawn token."""

    ended: str
    depths: list[int] | None = None


class CompletionLogprobs(Out):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Out):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    mor: ChoiceNotes


class Completion(Out):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: ModelUsage


class TopLogprob(Out):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Out):
    content: list[ChatLogprob]
    refusal: None = None


class ChatMessageOut(Out):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Out):
    index: int
    message: ChatMessageOut
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    mor: ChoiceNotes


class ChatReply(Out):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ModelUsage


class ServedModelOut(ModelOut):
    owned_by: str = "mor_jax"
    max_model_len: int


class ServedModelList(Out):
    object: Literal["list"] = "list"
    data: list[ServedModelOut]


class Tokenized(Out):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Out):
    prompt: str


class Version(Out):
    version: str


class TokenizerInfo(Out):
    """What a client needs to cut texts as the model does."""

    tokenizer_class: str
    vocab_size: int
    bos_token: str
    eos_token: str
    eot_token: str
    bos_token_id: int
    eos_token_id: int
    model_max_length: int
    chat_template: str

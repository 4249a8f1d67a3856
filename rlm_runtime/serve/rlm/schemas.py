"""What goes over the wire of an RLM server: OpenAI's chat completion, and our extensions under the
key `rlm`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from rlm_runtime.serve.http.errors import refuse
from rlm_runtime.serve.http.schemas import (
    ChatFields,
    FileId,
    GenerationRequest,
    ModelOut,
    Name,
    Out,
    RefusalPart,
    SchemaFormat,
    TextPart,
    Wire,
)

Count = Annotated[int, Field(ge=0, le=2**53)]
Progress = Literal["field", "reasoning", "comment", "none"]


# ---- requests


class FileRef(Wire):
    """Either an uploaded file, or its bytes in base64, with or without `data:...;base64,` before
    them."""

    file_id: FileId | None = None
    file_data: str | None = None
    filename: Name | None = None


class FilePart(Wire):
    type: Literal["file"]
    file: FileRef


class InputFilePart(FileRef):
    type: Literal["input_file"]


class ImagePart(Wire):
    """Known so that it can be refused by name."""

    type: Literal["image_url", "input_image", "input_audio"]


Part = Annotated[
    TextPart | RefusalPart | FilePart | InputFilePart | ImagePart, Field(discriminator="type")
]


class Function(Wire):
    name: Name
    arguments: str = ""


class PastToolCall(Wire):
    id: Name
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=10_000)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[PastToolCall], Field(max_length=1_000)] | None = None
    tool_call_id: Name | None = None


class BudgetOptions(Wire):
    """Limits of this run, over the whole tree of calls. Each is cut to the server's own limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    turns: Annotated[int, Field(ge=1, le=10_000)] | None = None
    sub_calls: Count | None = None
    input_tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    output_tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    usd: Annotated[float, Field(gt=0, le=1e9)] | None = None
    seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    consecutive_errors: Annotated[int, Field(ge=1, le=10_000)] | None = None
    repeats: Annotated[int, Field(ge=2, le=10_000)] | None = None


class RlmOptions(Wire):
    """Our extension of the request."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    budget: BudgetOptions | None = None
    max_depth: Annotated[int, Field(ge=0, le=16)] | None = None
    context_file_ids: Annotated[list[FileId], Field(max_length=256)] | None = None
    question: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    progress: Progress | None = None


# What types alone do not say, for the OpenAPI document.
TEXT = {"type": "string", "pattern": "\\S"}
QUESTION: dict[str, Any] = {
    "description": "One message at least is a user's; the last text of the last one is the question.",
    "contains": {
        "properties": {"role": {"const": "user"}, "content": TEXT},
        "required": ["role", "content"],
    },
}


UNUSED = (
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "modalities",
    "audio",
)


class ChatRequest(GenerationRequest, ChatFields):
    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=100_000, json_schema_extra=QUESTION)
    ]
    max_tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    rlm: RlmOptions | None = None
    # One answer: these are read only to refuse, by name, what they would ask for.
    n: Annotated[int | None, WithJsonSchema({"enum": [1, None]})] = None
    logprobs: Annotated[bool | None, WithJsonSchema({"enum": [False, None]})] = None
    top_logprobs: Annotated[int | None, WithJsonSchema({"enum": [0, None]})] = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def check(self) -> None:
        """Raises ApiError for fields that would have no effect."""
        if self.n not in (None, 1):
            raise refuse("n must be 1: a run gives one answer.", "n", "unsupported_value")
        tools = (
            "cannot be given in a request; the tools of an RLM are set where the server is started."
        )
        self.check_text_only(tools, "there are no tools.")
        if self.logprobs or self.top_logprobs:
            text = "logprobs are not available: the answer comes out of a program."
            raise refuse(text, "logprobs", "unsupported_parameter")
        self.check_stream()
        if self.metadata is not None and (
            len(self.metadata) > 16
            or any(len(k) > 64 or len(v) > 512 for k, v in self.metadata.items())
        ):
            raise refuse(
                "metadata takes 16 pairs, keys to 64 and values to 512 characters.", "metadata"
            )

    def ignored(self) -> list[str]:
        """Fields that were given and had no effect."""
        silent = [name for name in UNUSED if getattr(self, name) not in (None, [], {})]
        unknown = [name for name, value in (self.model_extra or {}).items() if value is not None]
        return sorted(name[:64] for name in [*silent, *unknown])[:50]

    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema the answer must meet; None: any text."""
        form = self.response_format
        if isinstance(form, SchemaFormat):
            return form.json_schema.schema_ or {"type": "object"}
        return {"type": "object"} if form is not None and form.type == "json_object" else None


# ---- responses


class PromptDetails(Out):
    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionDetails(Out):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class UsageOut(Out):
    """Summed over the whole tree. `reasoning_tokens` is what was generated beyond the answer, by an
    estimate."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class DepthUsage(Out):
    calls: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    cost_usd: float | None


class RunReport(Out):
    """Our extension of the response: what the run did and what it cost."""

    run: str
    stop_reason: str
    partial: bool
    turns: int
    sub_calls: int  # of the whole tree
    calls: int  # model calls of the whole tree, the root's included
    cost_usd: float | None
    seconds: float
    usage_by_depth: dict[str, DepthUsage]
    budget: dict[str, float | None]  # the limits that held, after the server's own
    ignored: list[str] = Field(default_factory=list)  # fields of the request that had no effect


class AnswerMessage(Out):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class Choice(Out):
    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Out):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageOut
    system_fingerprint: str | None = None
    rlm: RunReport


class ModelList(Out):
    object: Literal["list"] = "list"
    data: list[ModelOut]

"""What goes over the wire: OpenAI's chat completion, file and model objects, and our extensions under the key `rlm`.

The OpenAPI document is made from these models, and requests are checked by them, so the two cannot drift apart.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

Name = Annotated[str, Field(max_length=256)]
Count = Annotated[int, Field(ge=0, le=2**53)]
FileId = Annotated[str, Field(pattern=r"^file-[0-9a-f]{32}$")]
Progress = Literal["field", "reasoning", "comment", "none"]


class Wire(BaseModel):
    """A request object. Fields we do not know are allowed, and reported as ignored."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Out(BaseModel):
    """A response object."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---- requests


class TextPart(Wire):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(Wire):
    type: Literal["refusal"]
    refusal: str


class FileRef(Wire):
    """Either an uploaded file, or its bytes in base64, with or without `data:...;base64,` before them."""

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


Part = Annotated[TextPart | RefusalPart | FilePart | InputFilePart | ImagePart, Field(discriminator="type")]


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


class JsonSchema(Wire):
    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class PlainFormat(Wire):
    type: Literal["text", "json_object"]


class SchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Wire):
    include_usage: bool | None = None


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
NOTHING: dict[str, Any] = {"type": ["array", "null"], "maxItems": 0}
TEXT = {"type": "string", "pattern": "\\S"}
QUESTION: dict[str, Any] = {
    "description": "One message at least is a user's; the last text of the last one is the question.",
    "contains": {"properties": {"role": {"const": "user"}, "content": TEXT}, "required": ["role", "content"]},
}


class ChatRequest(Wire):
    model: Name
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=100_000, json_schema_extra=QUESTION)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**53)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1_000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1_000)]], Field(max_length=4)]
        | None
    ) = None
    response_format: ResponseFormat | None = None
    rlm: RlmOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    # One answer, as text: these are read only to refuse, by name, what they would ask for.
    n: Annotated[int | None, WithJsonSchema({"enum": [1, None]})] = None
    logprobs: Annotated[bool | None, WithJsonSchema({"enum": [False, None]})] = None
    top_logprobs: Annotated[int | None, WithJsonSchema({"enum": [0, None]})] = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: Annotated[list[Any] | None, WithJsonSchema(NOTHING)] = None
    tool_choice: Annotated[Any, WithJsonSchema({"enum": ["none", "auto", None]})] = None
    functions: Annotated[list[Any] | None, WithJsonSchema(NOTHING)] = None
    function_call: Annotated[Any, WithJsonSchema({"enum": ["none", "auto", None]})] = None
    modalities: Annotated[list[str] | None, WithJsonSchema({"enum": [["text"], None]})] = None
    audio: Annotated[Any, WithJsonSchema({"type": "null"})] = None


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
    """Summed over the whole tree. `reasoning_tokens` is what was generated beyond the answer, by an estimate."""

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


class ModelOut(Out):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rlm_runtime"


class ModelList(Out):
    object: Literal["list"] = "list"
    data: list[ModelOut]


class FileOut(Out):
    id: FileId
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(Out):
    object: Literal["list"] = "list"
    data: list[FileOut]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class FileDeleted(Out):
    id: FileId
    object: Literal["file"] = "file"
    deleted: bool = True


class ErrorDetail(Out):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Out):
    error: ErrorDetail


class Status(Out):
    status: str

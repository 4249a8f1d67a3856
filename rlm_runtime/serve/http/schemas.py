"""Objects of OpenAI's API that both servers read or send.

The OpenAPI documents are made from these models, and requests are checked by them, so the two
cannot drift apart.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from rlm_runtime.serve.http.errors import refuse

Name = Annotated[str, Field(max_length=256)]
StopText = Annotated[str, Field(min_length=1, max_length=1_000)]
FileId = Annotated[str, Field(pattern=r"^file-[0-9a-f]{32}$")]
# What types alone do not say, for the OpenAPI document.
NOTHING: dict[str, Any] = {"type": ["array", "null"], "maxItems": 0}
NO_TOOL: dict[str, Any] = {"enum": ["none", "auto", None]}


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


class GenerationRequest(Wire):
    """The fields that every endpoint which generates text has."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream(self) -> None:
        """Raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options needs stream: true.", "stream_options")


class ChatFields(Wire):
    """Fields of a chat request that ask for more than text; they are read only to be refused by
    name."""

    metadata: dict[str, str] | None = None
    tools: Annotated[list[Any] | None, WithJsonSchema(NOTHING)] = None
    tool_choice: Annotated[Any, WithJsonSchema(NO_TOOL)] = None
    functions: Annotated[list[Any] | None, WithJsonSchema(NOTHING)] = None
    function_call: Annotated[Any, WithJsonSchema(NO_TOOL)] = None
    modalities: Annotated[list[str] | None, WithJsonSchema({"enum": [["text"], None]})] = None
    audio: Annotated[Any, WithJsonSchema({"type": "null"})] = None

    def check_text_only(self, refusal: str, reason: str) -> None:
        """Raises ApiError. `refusal` goes behind "tools ...", `reason` behind "tool_choice must be
        none or auto: ..."."""
        for name, value in (("tools", self.tools), ("functions", self.functions)):
            if value:
                raise refuse(f"{name} {refusal}", name, "unsupported_parameter")
        for name, value in (
            ("tool_choice", self.tool_choice),
            ("function_call", self.function_call),
        ):
            if value not in (None, "none", "auto"):
                raise refuse(f"{name} must be none or auto: {reason}", name, "unsupported_value")
        if self.audio is not None or any(m != "text" for m in self.modalities or ()):
            raise refuse("Only text comes out of this model.", "modalities", "unsupported_value")


# ---- responses


class ModelOut(Out):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rlm_runtime"


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


class Status(Out):
    status: str

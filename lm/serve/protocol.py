"""The requests of OpenAI's API, as pydantic models. Types are strict and unknown fields are errors,
as at OpenAI: a misspelt field would otherwise be ignored."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lm.errors import nearest
from lm.generate.request import MOST_LOGPROBS
from lm.serve.errors import ApiError

MOST_CHOICES, MOST_STOPS, MOST_BIASES = 128, 16, 1024
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# Fields of OpenAI's API that do not change what is generated.
IGNORED = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "store",
)
# Fields that would change it, and what to do instead.
REFUSED = {
    "suffix": "leave it out; the model continues a prompt and cannot fill a gap",
    "functions": "use tools",
    "function_call": "use tools and tool_choice",
    "audio": "leave it out; the model writes text",
    "prediction": "leave it out",
    "web_search_options": "leave it out",
    "reasoning_effort": "leave it out",
    "verbosity": "leave it out",
    "use_beam_search": "leave it out; the model samples",
    "prompt_logprobs": "use echo with logprobs, of /v1/completions",
}

Id = Annotated[int, Field(ge=0)]
Schema = dict[str, Any]


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = STRICT
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(BaseModel):
    """`response_format.json_schema`."""

    model_config = STRICT
    name: str = "schema"
    description: str | None = None
    strict: bool | None = None
    schema_: Schema = Field(alias="schema")


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """`structured_outputs`, a field of vLLM's; one of these."""

    model_config = STRICT
    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class Options(BaseModel):
    """What both kinds of requests have."""

    model_config = STRICT
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: list[str] = []
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    response_format: ResponseFormat | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # As in vLLM.
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    ignore_eos: bool = False
    stop_token_ids: list[Id] = []
    structured_outputs: StructuredOutputs | None = None

    @property
    def is_guided(self) -> bool:
        """Whether the text must follow a schema or a grammar."""
        wanted = self.response_format
        return self.structured_outputs is not None or (wanted is not None and wanted.type != "text")

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
            raise ValueError("must be a text or a list of texts")
        if "" in stops or len(stops) > MOST_STOPS:
            raise ValueError(f"must be at most {MOST_STOPS} texts, none of them empty")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, value: dict[str, float]) -> dict[str, float]:
        if len(value) > MOST_BIASES or not all(key.isascii() and key.isdigit() for key in value):
            raise ValueError(f"must have at most {MOST_BIASES} fields, named by token ids")
        return value


class CompletionRequest(Options):
    """POST /v1/completions."""

    prompt: list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        def is_ids(each: Any) -> bool:
            return isinstance(each, list) and bool(each) and all(map(_is_id, each))

        if isinstance(value, str) or is_ids(value):
            return [value]
        parts = value if isinstance(value, list) else []
        if parts and (all(isinstance(x, str) for x in parts) or all(map(is_ids, parts))):
            return parts
        raise ValueError("must be a text, a list of texts, token ids, or a list of those")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


class Function(BaseModel):
    """A function that the model may call."""

    model_config = STRICT
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """An entry of `tools`."""

    model_config = STRICT
    type: Literal["function"]
    function: Function


class ChatRequest(Options):
    """POST /v1/chat/completions. `messages` are as the template reads them."""

    messages: list[dict[str, Any]]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] = ["text"]

    @field_validator("messages", mode="plain")
    @classmethod
    def _messages(cls, value: Any) -> Any:
        if not isinstance(value, list) or not value:
            raise ValueError("must be a list of messages, at least one")
        return [_message(each, f"messages.{i}") for i, each in enumerate(value)]

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _tool_choice(cls, value: Any) -> Any:
        if value not in ("none", "auto"):
            raise ValueError("must be 'none' or 'auto'; a call cannot be required")
        return value


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message with the fields that templates know. Fields of an earlier answer of the server are
    taken back."""
    roles = ("system", "developer", "user", "assistant", "tool")
    if not isinstance(value, Mapping) or value.get("role") not in roles:
        raise ValueError(f"{where}.role must be one of {', '.join(roles)}")
    # OpenAI's newer name for the same.
    role = "system" if value["role"] == "developer" else value["role"]
    message = {"role": role, "content": _content(value.get("content"), where)}
    if calls := value.get("tool_calls"):
        message["tool_calls"] = _calls(calls, where)
    elif message["content"] is None:
        raise ValueError(f"{where}.content must be text, or a list of parts of type 'text'")
    for name in ("name", "tool_call_id"):
        if value.get(name) is not None:
            if not isinstance(value[name], str):
                raise ValueError(f"{where}.{name} must be text")
            message[name] = value[name]
    return message


def _content(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [None]
    for part in parts:
        is_text = isinstance(part, Mapping) and part.get("type") in ("text", "refusal")
        if not is_text or not isinstance(part.get(part["type"]), str):
            raise ValueError(f"{where}.content must be text, or a list of parts of type 'text'")
    return "".join(part[part["type"]] for part in parts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Earlier calls; templates read the arguments as an object, the API has them as its JSON."""
    calls = []
    for call in value if isinstance(value, list) else [None]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}.tool_calls must be objects with function.name")
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ValueError(
                    f"{where}.tool_calls: function.arguments must be JSON in a text"
                ) from None
        function = {"name": function["name"], "arguments": arguments}
        calls.append({"type": "function", "id": call.get("id"), "function": function})
    return calls


Kind = TypeVar("Kind", bound=Options)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request in a body. Raises ApiError 400 that names the field."""
    try:
        fields = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    # Clients send null for what is not set.
    fields = {name: x for name, x in fields.items() if x is not None and name not in IGNORED}
    for name in fields:
        if name in REFUSED:
            message = f"{name} is not supported; {REFUSED[name]}."
            raise ApiError(400, message, param=name, code="unsupported_parameter")
        if name not in kind.model_fields:
            message = f"{name} is not known.{nearest(name, kind.model_fields)}"
            raise ApiError(400, message, param=name, code="unknown_parameter")
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing.", param=param, code="missing_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not known.", param=param, code="unknown_parameter")
    if message.startswith(param):  # it names a part of the field
        return ApiError(400, f"{message}.", param=message.split()[0], code="invalid_value")
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ApiError(400, f"{param}={shown}: {message}.", param=param, code="invalid_value")

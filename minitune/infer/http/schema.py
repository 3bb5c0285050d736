"""What a client may send: OpenAI's fields, and those of vLLM's that mean something here.

A field that would change the answer and is not supported is refused, unless it has the value that changes nothing;
a field that can't change it is ignored; an unknown one is refused by name, since a misspelt setting that does
nothing is worse than an error.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Fields of other servers, with the values that ask for nothing we lack.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}
IGNORED = (
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "verbosity", "priority", "request_id"),
)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def as_text(content: Any) -> Any:
    """A string, or a list of text parts joined by line breaks as vLLM and llama.cpp join them."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"only parts of type text are taken, not {kind}")
        texts.append(text)
    return "\n".join(texts)


def as_role(role: Any) -> Any:
    if role in ("tool", "function"):
        raise ValueError(f"{role} turns are not taken: these models call no tools")
    return ROLES.get(role, role) if isinstance(role, str) else role


class Incoming(BaseModel):
    """One message; satisfies the template's Turn."""

    model_config = ConfigDict(extra="ignore")  # name, refusal, annotations, … of answers that are sent back
    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(as_role)]
    content: Annotated[str, BeforeValidator(as_text)] = ""
    learn: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def no_tools(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tool_calls"):
            raise ValueError("tool calls are not taken")
        return values


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="ignore")  # name, description, strict
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def whole(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


def as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def refused(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "field": field})


def refuse_unknown(cls: type[BaseModel], values: Any) -> Any:
    """Drops neutral and ignored fields; names the others."""
    if not isinstance(values, dict):
        return values
    kept = {}
    for name, value in values.items():
        if name in cls.model_fields:
            kept[name] = value
        elif name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise refused(name, f"`{name}` is not supported here; leave it out")
        elif name not in IGNORED:
            near = difflib.get_close_matches(str(name), [*cls.model_fields, *NEUTRAL], n=1)
            mend = f"; did you mean `{near[0]}`?" if near else ""
            raise refused(name, f"unknown field `{name}`{mend}")
    return kept


class Asked(BaseModel):
    """What both routes take. None: not said, so the server's default."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(as_list), Field(max_length=16)] = []
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]] | None, Field(max_length=1024)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def known(cls, values: Any) -> Any:
        return refuse_unknown(cls, values)

    @model_validator(mode="after")
    def options(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "`stream_options` is for `stream: true` alone")
        return self

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatAsked(Asked):
    messages: Annotated[list[Incoming], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @model_validator(mode="after")
    def both(self) -> ChatAsked:
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "`top_logprobs` needs `logprobs: true`")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[int], Field(min_length=1)]


class CompletionAsked(Asked):
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=128)]
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt or many, each a text or its ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def limit(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default for this route

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs


class TutorialAsked(BaseModel):
    """The form of the tutorial's FastAPI chapter; more than these fields is ignored, as it does."""

    model_config = ConfigDict(extra="ignore")
    prompt: str
    history: list[Any] | None = None
    max_length: Annotated[int | None, Field(ge=1)] = None
    top_p: float | None = None
    temperature: float | None = None
    model: str | None = None

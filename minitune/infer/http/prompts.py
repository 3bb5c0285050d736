"""What a client asked -> the engine's requests. Prompts are built by the template that was recorded, nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from minitune.config import UserError
from minitune.infer.chat import Message, printable
from minitune.infer.http.errors import ApiError
from minitune.infer.http.schema import Asked, ChatAsked, CompletionAsked
from minitune.infer.request import Request
from minitune.infer.sampling import Bias, Sampling

if TYPE_CHECKING:
    from minitune.data.template import Turn
    from minitune.infer.http.service import Service

SEEDS = 2**63
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def chat_ids(service: Service, adapter: str, messages: Sequence[Turn]) -> list[int]:
    """The ids that training built for such a conversation. Raises ApiError for one that has no prompt."""
    turns = [Message(turn.role, printable(turn.content)) for turn in messages]
    try:
        return service.template(adapter).prompt_ids(turns)
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    except TemplateError as error:  # a checkpoint's own template refuses some orders of turns
        raise ApiError(400, f"the model's chat template refuses this: {error}", param="messages") from None


def text_ids(service: Service, prompt: str | Sequence[int]) -> list[int]:
    """A plain text's ids, special tokens in it and BOS in front as the tokenizer's own settings say."""
    session = service.ready()
    if isinstance(prompt, str):
        ids = list(session.tokenizer(printable(prompt), split_special_tokens=False)["input_ids"])
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        return ids
    vocab = session.engine.decoder.config.vocab_size
    bad = next((i for i in prompt if not 0 <= i < vocab), None)
    if bad is not None:
        raise ApiError(400, f"token {bad} is not one of the model's {vocab}", param="prompt")
    return list(prompt)


def check_length(service: Service, ids: Sequence[int], param: str) -> None:
    if len(ids) >= service.limit:
        message = f"the prompt has {len(ids)} tokens, the model reads fewer than {service.limit}; shorten it"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def sampling_of(service: Service, asked: Asked, room: int) -> Sampling:
    """The request's settings, the server's where it says nothing; as many tokens as there is room for."""
    given = {name: value for name in NAMES if (value := getattr(asked, name)) is not None}
    if given.get("top_k") == -1:  # vLLM's word for none
        given["top_k"] = 0
    seed = None if asked.seed is None else asked.seed % SEEDS
    limit: int | None = asked.limit  # type: ignore[attr-defined]  # of both routes
    try:
        return replace(service.settings.sampling, **given, seed=seed, max_new_tokens=min(limit or room, room))
    except UserError as error:  # it begins with the setting's name
        raise ApiError(400, str(error), param=str(error).split()[0]) from None


def bias_of(service: Service, asked: Asked) -> Bias | None:
    """What the request adds to scores; None for nothing."""
    tokens = asked.logit_bias or {}
    vocab = service.ready().engine.decoder.config.vocab_size
    bad = next((token for token in tokens if not 0 <= token < vocab), None)
    if bad is not None:
        raise ApiError(400, f"token {bad} is not one of the model's {vocab}", param="logit_bias")
    bias = Bias(asked.presence_penalty or 0.0, asked.frequency_penalty or 0.0, tuple(t for t in tokens.items() if t[1]))
    return None if bias == Bias() else bias


def requests_of(service: Service, asked: ChatAsked | CompletionAsked) -> list[Request]:
    """One for each answer: prompt by prompt, `n` of each. Runs on the worker thread."""
    adapter = service.adapter_of(asked.model)
    template = service.template(adapter)
    if isinstance(asked, ChatAsked):
        prompts, param = [chat_ids(service, adapter, asked.messages)], "messages"
    else:
        prompts, param = [text_ids(service, prompt) for prompt in asked.prompts], "prompt"
    stop_ids = frozenset(() if asked.ignore_eos else template.stop_ids) | frozenset(asked.stop_token_ids or ())
    bias = bias_of(service, asked)
    out = []
    for ids in prompts:
        check_length(service, ids, param)
        sampling = sampling_of(service, asked, service.limit - len(ids))
        for i in range(asked.n or 1):
            own = sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + i) % SEEDS)
            request = Request(
                tuple(ids),
                own,
                stop_ids=stop_ids,
                stop=tuple(asked.stop),
                adapter=adapter,
                logprobs=asked.logprobs_wanted,
                bias=bias,
            )
            out.append(constrained(service, asked, request))
    return out


def constrained(service: Service, asked: Asked, request: Request) -> Request:
    """With a grammar of its own where the answer must be JSON."""
    form = asked.response_format
    if form is None or form.type == "text":
        return request
    schema = form.json_schema.schema_ if form.json_schema is not None and form.type == "json_schema" else None
    try:
        return replace(request, grammar=service.grammars().json(schema))
    except UserError as error:
        raise ApiError(400, str(error), param="response_format") from None

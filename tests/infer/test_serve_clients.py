"""The clients that people use, against a real socket: `openai` and `langchain-openai`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="the extra dev is not installed")

import openai
from scripted import scripted_session
from serving import Served, served

from minitune.infer.http import answers

SAID = "你好, abc. 今天𠮷 end"
USER: Any = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    session = scripted_session(tmp_path_factory.mktemp("m"), lambda r: SAID + r.adapter, ("tuned",))
    with served(session, "tiny", ("tuned",), api_keys=("the-key",), max_queue=0) as ready:
        yield ready


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="the-key", max_retries=0)


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tuned",
        messages=[{"role": "system", "content": "abc"}, *USER],
        temperature=0,
        n=2,
        logprobs=True,
        top_logprobs=1,
        presence_penalty=0.5,
        frequency_penalty=0,
        logit_bias={"5": -1},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.05},
    )
    assert [c.message.content for c in answer.choices] == [SAID + "tuned"] * 2
    assert answer.choices[0].finish_reason == "stop" and answer.usage.total_tokens > 0
    assert bytes(b for e in answer.choices[0].logprobs.content for b in e.bytes).decode() == SAID + "tuned"


def test_stream(client: Any) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SAID
    assert chunks[-1].usage.completion_tokens > 0 and [c.choices[0].finish_reason for c in chunks[-2:-1]] == ["stop"]
    with client.chat.completions.stream(model="tiny", messages=USER) as events:
        assert events.get_final_completion().choices[0].message.content == SAID


def test_a_silent_stream_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments while nothing comes, so that no proxy closes the connection; the client passes over them."""
    monkeypatch.setattr(answers, "PING_SECONDS", 0.05)
    with served(scripted_session(tmp_path, lambda _: "ab", pace=0.2)) as slow:
        asked = {"model": "tiny", "messages": USER, "stream": True}
        with slow.http.stream("POST", "/v1/chat/completions", json=asked) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines.count(": waiting") >= 3
        client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0)
        pieces = client.chat.completions.create(**asked)
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == "ab"


def test_completions_and_models(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["tiny", "tuned"]
    assert client.models.retrieve("tuned").id == "tuned"
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=5, logprobs=1)
    assert answer.choices[0].text == SAID[:5] and answer.choices[0].logprobs.tokens == list(SAID[:5])
    pieces = client.completions.create(model="tiny", prompt="abc", max_tokens=5, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == SAID[:5]


def test_errors_are_the_client_s_own(server: Served, client: Any) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        ask(model="gpt-9", messages=USER)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(model="tiny", messages=USER, temperature=-2)
    with pytest.raises(openai.BadRequestError) as long:
        ask(model="tiny", messages=[{"role": "user", "content": "a" * 3000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
    server.service.gate.inside = 4
    try:
        with pytest.raises(openai.RateLimitError) as busy:
            ask(model="tiny", messages=USER)
        assert int(busy.value.response.headers["retry-after"]) >= 1
    finally:
        server.service.gate.inside = 0


def test_json_by_a_pydantic_model(client: Any) -> None:
    """`parse` sends the model's schema; what comes back is an instance of it, whatever the model would have said."""
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: str = Field(max_length=8)
        age: int = Field(ge=0, le=130)
        alive: bool

    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny", messages=USER, response_format=Person, seed=seed, max_tokens=800
        )
        assert isinstance(answer.choices[0].message.parsed, Person)
    free = client.chat.completions.create(
        model="tiny", messages=USER, response_format={"type": "json_object"}, seed=1, max_tokens=1500
    )
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(free.choices[0].message.content), dict)


def test_langchain(server: Served) -> None:
    """The tutorial's LangChain chapter, without a class of one's own: invoke, stream, batch, structured output."""
    langchain = pytest.importorskip("langchain_openai", reason="the extra dev is not installed")
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from pydantic import BaseModel

    llm = langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="the-key", model="tuned", temperature=0.5)
    answer = llm.invoke("你好")
    assert answer.content == SAID + "tuned" and answer.usage_metadata["output_tokens"] > 0
    assert "".join(part.content for part in llm.stream("你好")) == SAID + "tuned"
    chain = ChatPromptTemplate.from_messages([("system", "abc"), ("user", "{q}")]) | llm | StrOutputParser()
    assert chain.batch([{"q": "a"}, {"q": "你好"}]) == [SAID + "tuned"] * 2

    class Place(BaseModel):
        warm: bool

    assert isinstance(llm.with_structured_output(Place, method="json_schema").invoke("?"), Place)
    old = langchain.OpenAI(base_url=f"{server.url}/v1", api_key="the-key", model="tiny", max_tokens=4)
    assert old.invoke("abc") == SAID[:4]

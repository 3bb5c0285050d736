"""The server over the engine itself and a real (tiny) model: what is served is what the chat says and what was trained."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="the extra dev is not installed")

from serving import Served, served, until

from minitune.checkpoint.stream import token_bytes
from minitune.checkpoint.weights import load_model
from minitune.infer.chat import Message, load
from minitune.infer.http.logprobs import token_text
from minitune.infer.sampling import Sampling
from minitune.infer.session import open_model

CHAT = "/v1/chat/completions"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture
def server(talker: Path, adapter: Path) -> Iterator[Served]:
    session = open_model(str(talker), {"tuned": adapter}, dtype="float32", device="cpu", slots=4)
    with served(session, "tiny", ("tuned",)) as ready:
        yield ready


@pytest.mark.parametrize("tuned", [False, True])
def test_served_is_what_the_chat_says(server: Served, talker: Path, adapter: Path, tuned: bool) -> None:
    """Three turns with a system text, base and adapter: the same greedy text as `minitune chat`, whole and streamed."""
    chat = load(str(talker), str(adapter) if tuned else None, system="你是谁", sampling=Sampling(0, max_new_tokens=12),
                dtype="float32", device="cpu")  # fmt: skip
    messages = [{"role": "system", "content": "你是谁"}]
    name = "tuned" if tuned else "tiny"
    for question in ("你好", "我是谁?", "abc"):
        said = "".join(chat.ask(question))
        messages.append({"role": "user", "content": question})
        body = server.chat(model=name, messages=messages, **GREEDY).json()
        assert body["choices"][0]["message"]["content"] == said
        chunks = server.events(CHAT, model=name, messages=messages, **GREEDY)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == said
        messages.append({"role": "assistant", "content": said})
    template = server.service.session.templates["tuned" if tuned else ""]  # type: ignore[union-attr]
    assert template.tuned == tuned  # an untuned one is prompted as its official chat function does
    turns = [Message(m["role"], m["content"]) for m in messages[:-1]]
    assert body["usage"]["prompt_tokens"] == len(template.prompt_ids(turns))


def test_logprobs_are_the_model_s(server: Served, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the chosen token and the likeliest, as a plain forward pass of the whole text gives them."""
    engine, handles = server.service.session.engine, []  # type: ignore[union-attr]
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda *given: handles.append(submit(*given)) or handles[-1])
    asked = {"model": "tiny", "prompt": [1, 300, 301], "logprobs": 3, "max_tokens": 6, "seed": 2, "ignore_eos": True}
    form = server.http.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]
    decoder, ids = load_model(talker, None, "float32", "cpu"), [1, 300, 301]
    spell = token_bytes(engine.tokenizer)
    assert len(form["tokens"]) == len(handles[0].ids) == 6
    for i, drawn in enumerate(handles[0].ids):
        with torch.inference_mode():
            exact = decoder.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
        best = exact.topk(3)
        assert form["tokens"][i] == token_text(spell(drawn))
        assert form["token_logprobs"][i] == pytest.approx(float(exact[drawn]), abs=1e-4)
        assert sorted(form["top_logprobs"][i].values()) == pytest.approx(sorted(best.values.tolist()), abs=1e-4)
        assert set(form["top_logprobs"][i]) == {token_text(spell(j)) for j in best.indices.tolist()}
        ids.append(drawn)


def test_a_seed_is_a_text(server: Served) -> None:
    """The same seed says the same alone and in a crowd, other seeds other things, n answers n things."""
    hot: dict[str, Any] = {"temperature": 1.5, "top_p": 1, "max_tokens": 16}

    def say(seed: int) -> str:
        return server.chat(seed=seed, **hot).json()["choices"][0]["message"]["content"]

    alone = {seed: say(seed) for seed in range(8)}
    assert len(set(alone.values())) == 8
    crowd: dict[int, str] = {}
    threads = [threading.Thread(target=lambda s=seed: crowd.update({s: say(s)})) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert crowd == alone
    several = server.chat(seed=3, n=3, **hot).json()["choices"]
    assert [c["message"]["content"] for c in several] == [alone[3], alone[4], alone[5]]
    assert len({server.chat(**hot).json()["choices"][0]["message"]["content"] for _ in range(3)}) > 1


def test_stop_texts(server: Served) -> None:
    """The answer ends before the text, across tokens, in both routes; streamed, none of it is given out."""
    whole = server.chat(temperature=0, max_tokens=20, ignore_eos=True).json()["choices"][0]["message"]["content"]
    stop = whole[3:5]
    expected = whole[: whole.index(stop)]
    asked = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "stop": ["never", stop], "logprobs": True}
    choice = server.chat(**asked).json()["choices"][0]
    assert choice["message"]["content"] == expected and choice["finish_reason"] == "stop"
    told = bytes(b for e in choice["logprobs"]["content"] for b in e["bytes"]).decode("utf-8", "ignore")
    assert told.strip() == expected.strip()
    messages = [{"role": "user", "content": "你好"}]
    chunks = server.events(CHAT, model="tiny", messages=messages, **asked)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected


def test_json_from_a_model_that_knows_none(server: Served) -> None:
    """A random model, held by a schema, writes what the schema says, whole and streamed, several at once."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}, "who": {"enum": ["甄嬛", "眉庄"]}},
              "required": ["ok", "who"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    asked: dict[str, Any] = {"response_format": form, "temperature": 1, "max_tokens": 200, "n": 4, "seed": 1}
    said = [c["message"]["content"] for c in server.chat(**asked).json()["choices"]]
    for text in said:
        value = json.loads(text)
        assert set(value) == {"ok", "who"} and value["who"] in ("甄嬛", "眉庄")
    chunks = server.events(CHAT, model="tiny", messages=[{"role": "user", "content": "你好"}], **asked)
    pieces = [c["choices"][0] for c in chunks]
    assert ["".join(p["delta"].get("content", "") for p in pieces if p["index"] == i) for i in range(4)] == said
    bad = server.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "king"}}})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "response_format"


def test_a_client_that_leaves_frees_the_engine_s_slot(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.service.session.engine  # type: ignore[union-attr]
    stats, step = engine.stats, engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.05) or step())  # the tiny model would be done too soon
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": True, "ignore_eos": True}
    with server.http.stream("POST", CHAT, json=asked) as response:
        lines = response.iter_lines()  # kept: httpx closes the stream when its reader is gone
        assert next(lines)
        until(lambda: stats.running == 1)
    until(lambda: stats.cancelled == 1 and stats.running == 0)
    assert len(server.service.live) == server.service.gate.inside == stats.cache_tokens_used == 0


def test_more_than_there_are_slots(server: Served) -> None:
    """30 answers over 4 slots at once, adapters mixed: each is what it is alone."""
    texts = {
        name: server.chat(model=name, **GREEDY).json()["choices"][0]["message"]["content"] for name in ("tiny", "tuned")
    }
    assert texts["tiny"] != texts["tuned"]
    said: list[tuple[str, str]] = []

    def ask(name: str) -> None:
        said.append((name, server.chat(model=name, **GREEDY).json()["choices"][0]["message"]["content"]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ["tiny", "tuned"] * 15]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(said) == 30 and all(texts[name] == text for name, text in said)

"""The routes: OpenAI's forms, whole and streamed, and what is refused, in one line each and in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="the extra dev is not installed")

from scripted import scripted_session
from serving import Served, served

from minitune.infer.chat import Message
from minitune.infer.request import Request
from minitune.infer.sampling import Bias, Sampling

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAID = "你好, abc. 今天𠮷 end"
USER = [{"role": "user", "content": "你好"}]


def script(request: Request) -> str:
    return SAID + request.adapter


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    session = scripted_session(tmp_path_factory.mktemp("m"), script, ("tuned",))
    with served(session, "org/tiny", ("tuned",), sampling=Sampling(temperature=0.6, top_p=0.9)) as ready:
        yield ready


def last(server: Served) -> Request:
    return server.service.session.engine.seen[-1]  # type: ignore[union-attr]


def fault(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, whose form is OpenAI's and whose message is one line."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    return error


def test_chat_whole(server: Served) -> None:
    before = last(server) if server.service.session.engine.seen else None  # type: ignore[union-attr]
    body = server.chat().json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "org/tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": SAID, "refusal": None},
        }
    ]
    request = last(server)
    assert request is not before and request.adapter == "" and request.sampling.temperature == 0.6
    tokens = len(server.service.session.tokenizer(SAID, add_special_tokens=False)["input_ids"])  # type: ignore[union-attr]
    usage = {k: body["usage"][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")}
    prompt = len(request.prompt_ids)
    assert usage == {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def test_prompts_are_the_recorded_template_s(server: Served) -> None:
    """System texts, text parts, null content and the developer role reach the template as plain turns."""
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "abc"},
        {"role": "user", "content": [{"type": "text", "text": "你好"}, {"type": "text", "text": "谁?"}], "name": "x"},
        {"role": "assistant", "content": "我是", "refusal": None, "annotations": []},
        {"role": "user", "content": " 今天 "},
    ]
    assert server.chat(model="tuned", messages=messages).status_code == 200
    request = last(server)
    template = server.service.session.templates["tuned"]  # type: ignore[union-attr]
    turns = [("system", "abc"), ("user", "你好\n谁?"), ("assistant", "我是"), ("user", " 今天 ")]
    assert list(request.prompt_ids) == template.prompt_ids([Message(*turn) for turn in turns])
    assert request.adapter == "tuned" and request.stop_ids == frozenset(template.stop_ids)


def test_settings_reach_the_engine(server: Served) -> None:
    fields = {
        **{"temperature": 0.1, "top_p": 0.5, "top_k": 7, "min_p": 0.2, "repetition_penalty": 1.1, "seed": 5, "n": 3},
        **{"max_tokens": 4, "max_completion_tokens": 6, "stop": ["x", "yz"], "stop_token_ids": [9]},
        **{"user": "u", "metadata": {"a": "b"}, "frequency_penalty": 0.0, "tools": [], "logit_bias": None},
    }
    assert len(server.chat(**fields).json()["choices"]) == 3
    requests = server.service.session.engine.seen[-3:]  # type: ignore[union-attr]
    assert [r.sampling.seed for r in requests] == [5, 6, 7]  # n answers with one seed would be one answer
    s = requests[0].sampling
    assert requests[0].bias is None
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (0.1, 0.5, 7, 0.2, 1.1)
    assert s.max_new_tokens == 6 and requests[0].stop == ("x", "yz") and 9 in requests[0].stop_ids
    assert (
        server.chat(seed=-1, top_k=-1, ignore_eos=True, max_tokens=3).json()["choices"][0]["finish_reason"] == "length"
    )
    assert (last(server).sampling.seed or -1) >= 0 and last(server).sampling.top_k == 0 and not last(server).stop_ids
    server.chat(presence_penalty=-1, frequency_penalty=0.5, logit_bias={"7": 3, "9": -100})
    assert last(server).bias == Bias(-1.0, 0.5, ((7, 3.0), (9, -100.0)))
    server.chat(max_tokens=10**9)
    assert last(server).sampling.max_new_tokens == 2048 - len(last(server).prompt_ids)


def test_chat_stream(server: Served) -> None:
    """Role first, the text in order and whole, the reason once, the usage last where it is asked for."""
    chunks = server.events(CHAT, model="tuned", messages=USER, n=2, stream_options={"include_usage": True})
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert all(c["usage"] is None for c in chunks[:-1])
    for i in range(2):
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == i]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == SAID + "tuned"
        assert [c["finish_reason"] for c in own][-1] == "stop" and len([c for c in own if c["finish_reason"]]) == 1
        assert not any("\ufffd" in c["delta"].get("content", "") for c in own)
    assert "usage" not in server.events(CHAT, model="tuned", messages=USER)[0]


def test_completions(server: Served) -> None:
    """A text, ids, and lists of both; choices in order; 16 tokens unless said; usage of each prompt once."""
    tokenizer = server.service.session.tokenizer  # type: ignore[union-attr]
    cut = tokenizer.decode(tokenizer(SAID, add_special_tokens=False)["input_ids"][:16])
    assert len(cut) < len(SAID)
    for prompt, ids in (("abc", tokenizer("abc")["input_ids"]), ([5, 6, 7], [5, 6, 7])):
        body = server.http.post(COMPLETIONS, json={"model": "org/tiny", "prompt": prompt}).json()
        assert body["object"] == "text_completion" and body["choices"][0]["text"] == cut
        assert body["choices"][0]["finish_reason"] == "length" and list(last(server).prompt_ids) == ids
    many = {"model": "tuned", "prompt": ["a", "你好"], "n": 2, "max_tokens": 99}
    body = server.http.post(COMPLETIONS, json=many).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 3
    assert [c["text"] for c in body["choices"]] == [SAID + "tuned"] * 4
    lists = {"model": "tuned", "prompt": [[5], [6, 7]], "max_tokens": 2}
    assert len(server.http.post(COMPLETIONS, json=lists).json()["choices"]) == 2
    chunks = server.events(COMPLETIONS, **many)
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == 3) == SAID + "tuned"


def test_logprobs_of_both_routes(server: Served) -> None:
    """A token's string, bytes and offset; the pieces of a character spread over tokens keep their bytes."""
    content = server.chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == SAID
    assert [e["token"] for e in content][:4] == ["你", "好", ",", " "]
    assert any(e["token"].startswith("bytes:\\xf0") for e in content)  # 𠮷
    assert all(e["logprob"] == -0.5 and len(e["top_logprobs"]) == 1 for e in content)
    assert server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    streamed = server.events(CHAT, model="org/tiny", messages=USER, logprobs=True)
    told = [e for c in streamed if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert [e["bytes"] for e in told] == [e["bytes"] for e in content]
    asked = {"model": "org/tiny", "prompt": "a", "logprobs": 1, "max_tokens": 11}
    form = server.http.post(COMPLETIONS, json=asked).json()["choices"][0]["logprobs"]
    assert form["tokens"] == list(SAID[:11]) and form["text_offset"] == list(range(11))
    assert form["token_logprobs"] == [-0.5] * 11 and form["top_logprobs"][0] == {"你": -0.5}
    parts = [c["choices"][0]["logprobs"] for c in server.events(COMPLETIONS, **asked)]
    assert [o for p in parts if p for o in p["text_offset"]] == list(range(11))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "temperature is -1.0; it takes 0 or more"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"top_p": 1.5}, "top_p", "top_p is 1.5"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "list"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "ends in a user's turn"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "call no tools"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "not image_url"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"stop": ""}, "stop[0]", "at least 1 character"),
        ({"top_kk": 4}, "top_kk", "did you mean `top_k`"),
        ({"max_token": 4}, "max_token", "did you mean `max_tokens`"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"logit_bias": {"5": -101}}, "logit_bias.5", "greater than or equal to -100"),
        ({"logit_bias": {"king": 1}}, "logit_bias.king", "valid integer"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "not one of the model's"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "needs `logprobs: true`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "`stream: true`"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"seed": 1.5}, "seed", "valid integer"),
    ],
)
def test_a_bad_field_is_named(server: Served, fields: dict[str, Any], param: str | None, words: str) -> None:
    error = fault(server.chat(**fields), 400)
    assert error["type"] == "invalid_request_error" and words in error["message"], error
    assert param is None or error["param"] == param, error


def test_bodies_that_are_none(server: Served) -> None:
    post = server.http.post
    json_type = {"Content-Type": "application/json"}
    assert "not JSON" in fault(post(CHAT, content=b"{", headers=json_type), 400)["message"]
    assert "Content-Type" in fault(post(CHAT, content=b'{"model": "org/tiny"}'), 400)["message"]
    assert "JSON object" in fault(post(CHAT, content=b"[]", headers=json_type), 400)["message"]
    assert fault(post(CHAT, json={"messages": USER}), 400)["param"] == "model"
    assert fault(post(COMPLETIONS, json={"model": "org/tiny", "prompt": {}}), 400)["param"] == "prompt"
    assert "not one of" in fault(post(COMPLETIONS, json={"model": "org/tiny", "prompt": [1, 999999]}), 400)["message"]
    assert "empty" in fault(post(COMPLETIONS, json={"model": "org/tiny", "prompt": ""}), 400)["message"]
    lone = json.dumps({"model": "org/tiny", "messages": [{"role": "user", "content": "\ud800a"}]})
    assert post(CHAT, content=lone, headers=json_type).status_code in (200, 400)
    large = json.dumps({"model": "org/tiny", "messages": [{"role": "user", "content": "a" * (9 << 20)}]}).encode()
    assert "8 MiB" in fault(post(CHAT, content=large, headers=json_type), 413)["message"]
    parts = (large[i : i + 65536] for i in range(0, len(large), 65536))  # its length is not said beforehand
    assert "8 MiB" in fault(post(CHAT, content=parts, headers=json_type), 413)["message"]


def test_unknown_models_paths_and_methods(server: Served) -> None:
    error = fault(server.chat(model="gpt-9"), 404)
    assert error["code"] == "model_not_found" and "`org/tiny`, `tuned`" in error["message"]
    assert "GET /v1/nothing" in fault(server.http.get("/v1/nothing"), 404)["message"]
    assert "does not take GET" in fault(server.http.get(CHAT), 405)["message"]
    fault(server.http.get("/page/../guard.py"), 404)
    fault(server.http.get("/page/%2e%2e/guard.py"), 404)


def test_a_prompt_that_is_too_long(server: Served) -> None:
    error = fault(server.chat(messages=[{"role": "user", "content": "a" * 3000}]), 400)
    assert error["code"] == "context_length_exceeded" and "fewer than 2048" in error["message"]
    assert server.service.gate.inside == 0


def test_a_fault_inside_the_engine(tmp_path: Path) -> None:
    """A UserError while answering: 500 in OpenAI's form, and in a stream an event with `error` and no [DONE]."""
    from minitune.config import UserError

    def broken(_: Request) -> str:
        raise UserError("the model's scores are not finite")

    with served(scripted_session(tmp_path, broken)) as server:
        assert "not finite" in fault(server.chat(), 500)["message"]
        with server.http.stream("POST", CHAT, json={"model": "tiny", "messages": USER, "stream": True}) as response:
            data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert "not finite" in json.loads(data[-1])["error"]["message"]
        assert server.service.gate.inside == 0


def test_models(server: Served) -> None:
    listed = server.http.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(m["id"], m["parent"]) for m in listed["data"]] == [("org/tiny", None), ("tuned", "org/tiny")]
    assert server.http.get("/v1/models/org/tiny").json()["max_model_len"] == 2048
    fault(server.http.get("/v1/models/none"), 404)


def test_the_tutorial_s_route(server: Served) -> None:
    """prompt and history in, response and history out, in the history's own form; max_length counts the prompt."""
    post = server.http.post
    body = post("/", json={"prompt": "你好"}).json()
    assert set(body) == {"response", "history", "status", "time"} and body["status"] == 200
    assert body["response"] == SAID + "tuned"  # the one adapter, as the form names no model
    first = body["history"]
    assert first == [{"role": "user", "content": "你好"}, {"role": "assistant", "content": SAID + "tuned"}]
    for history in (first, [["你好", SAID + "tuned"]]):
        asked = {"prompt": "谁?", "history": history, "temperature": 0.5, "top_p": 0.7, "max_length": 300, "x": 1}
        body = post("/", json=asked).json()
        assert body["history"][: len(history)] == history and len(body["history"]) > len(history)
        turns = [("user", "你好"), ("assistant", SAID + "tuned"), ("user", "谁?")]
        template = server.service.session.templates["tuned"]  # type: ignore[union-attr]
        request = last(server)
        assert list(request.prompt_ids) == template.prompt_ids([Message(*turn) for turn in turns])
        assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.7)
        assert request.sampling.max_new_tokens == 300 - len(request.prompt_ids)
    assert body["history"][-1] == ["谁?", SAID + "tuned"]
    assert fault(post("/", json={"prompt": "a", "history": [["x"]]}), 400)["param"] == "history"
    assert fault(post("/", json={"prompt": "abc", "max_length": 5}), 400)["param"] == "max_length"
    assert fault(post("/", json={}), 400)["param"] == "prompt"

"""The session and `minitune chat --prompt`: what is served is what was trained, and what is read is what was said."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.config import UserError
from minitune.infer import chat as room
from minitune.infer.chat import Chat, Message, load, main, same_model, which
from minitune.infer.request import Piece, Request
from minitune.infer.sampling import Sampling

SHORT = Sampling(temperature=0, max_new_tokens=8)


def scripted(chat: Chat, *answers: str, why: str = "stop") -> list[list[int]]:
    """Puts answers, a piece a character, in the engine's place; returns the prompts that it was given."""
    prompts: list[list[int]] = []
    script = iter(answers)

    class Said:
        finish = why

        def __init__(self, text: str):
            self.pieces = [Piece(character, (9,)) for character in text]

        def __iter__(self) -> Iterator[Piece]:
            return iter([Piece("", (9,)), *self.pieces])  # a token without text, as of half a character

    def submit(request: Request) -> Said:
        prompts.append(list(request.prompt_ids))
        return Said(next(script))

    chat.engine = SimpleNamespace(submit=submit)  # type: ignore[assignment]
    return prompts


@pytest.fixture
def chat(talker: Path) -> Chat:
    return load(str(talker), sampling=SHORT, device="cpu", dtype="float32")


def test_turns_are_served_as_they_are_trained(talker: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three turns of a real (random) model with system text: what the engine is given is the row's encoding."""
    session = load(str(talker), str(adapter), sampling=SHORT, system="你是谁", device="cpu", dtype="float32")
    assert session.template.tuned
    requests: list[Request] = []
    submit = session.engine.submit
    monkeypatch.setattr(session.engine, "submit", lambda r: requests.append(r) or submit(r))
    for question in ("你好", "我是谁?", "abc"):
        said = "".join(session.ask(question))
        assert session.messages[-2:] == [Message("user", question), Message("assistant", said)]
        prompt = session.template.prompt_ids([Message("system", "你是谁"), *session.messages[:-1]])
        assert list(requests[-1].prompt_ids) == prompt
        assert requests[-1].adapter and requests[-1].stop_ids == {2}
    row = session.template.encode([Message("system", "你是谁"), *session.messages]).input_ids
    assert row[: len(prompt)] == prompt and prompt.count(2) == 2


def test_a_long_session_equals_a_fresh_one(talker: Path, adapter: Path) -> None:
    """The third answer after a kept cache is the one that the same history gives without any."""
    kept, fresh = (load(str(talker), str(adapter), sampling=SHORT, device="cpu") for _ in range(2))
    for question in ("你好", "谁?"):
        list(kept.ask(question))
    fresh.messages = list(kept.messages)
    assert list(kept.ask("abc")) == list(fresh.ask("abc"))
    assert kept.engine.stats.reused_tokens > 20 and fresh.engine.stats.reused_tokens == 0
    kept.clear()
    again = load(str(talker), str(adapter), sampling=SHORT, device="cpu")
    assert kept.messages == [] and list(kept.ask("你好")) == list(again.ask("你好"))


def test_history_holds_what_was_read(chat: Chat) -> None:
    """An answer that is broken off enters as far as it was read; a question without any answer does not."""
    prompts = scripted(chat, "你好吗", "你好吗", "", why="length")
    run = chat.ask("一")
    assert next(run) + next(run) == "你好"
    run.close()
    assert [m.content for m in chat.messages] == ["一", "你好"] and chat.finish == "broken off"
    run = chat.ask("二")
    run.close()  # never begun
    assert len(chat.messages) == 2
    assert "".join(chat.ask("三")) == "你好吗" and chat.finish == "length"
    assert list(chat.ask("四")) == []  # the model had nothing to say: that is an answer
    assert [m.content for m in chat.messages] == ["一", "你好", "三", "你好吗", "四", ""]
    assert chat.template.tokenizer.decode(prompts[1]).endswith("<用户>一<AI>你好<用户>三<AI>")


def test_breaking_off_frees_the_slot_and_keeps_the_cache(chat: Chat) -> None:
    """The only slot of a chat: the next question gets it, and does not read the same text again."""
    run = chat.ask("你好" * 9)
    next(run)
    run.close()
    assert chat.finish == "broken off"
    chat.messages.clear()
    assert list(chat.ask("你好" * 9)) and chat.finish in ("stop", "length")
    stats = chat.engine.stats
    assert (stats.cancelled, stats.running, stats.cache_tokens_used) == (1, 0, 0) and stats.reused_tokens > 9


def test_a_question_that_cannot_be_asked_leaves_the_history(chat: Chat) -> None:
    with pytest.raises(UserError, match="empty"):
        list(chat.ask(" \n"))
    with pytest.raises(UserError, match="reads fewer than 128; shorten it"):
        list(chat.ask("你" * 130))
    assert chat.messages == []
    assert list(chat.ask("\udcff你好")) and chat.messages[0].content == "?你好"


def test_prompt_prints_the_answer_and_nothing_else(talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """End to end from a folder; the text is that of transformers' Granite on the same weights, decoded by itself."""
    import torch
    from safetensors.torch import load_file
    from transformers import GraniteConfig, GraniteForCausalLM

    assert main(str(talker), prompt="你好", sampling=SHORT, device="cpu") == 0
    out, err = capsys.readouterr()
    raw = json.loads((talker / "config.json").read_text(encoding="utf-8"))
    twin = GraniteForCausalLM(
        GraniteConfig(
            **{k: raw[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw["num_key_value_heads"],
            rms_norm_eps=raw["rms_norm_eps"],
            tie_word_embeddings=True,
            embedding_multiplier=raw["scale_emb"],
            residual_multiplier=raw["scale_depth"] / raw["num_hidden_layers"] ** 0.5,
            logits_scaling=raw["hidden_size"] / raw["dim_model_base"],
            attention_multiplier=(raw["hidden_size"] / raw["num_attention_heads"]) ** -0.5,
        )
    )
    twin.load_state_dict(load_file(talker / "model.safetensors"), strict=False)
    twin.tie_weights()
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(talker / "tokenizer.json"))
    prompt = torch.tensor([[1, *plain.encode("<用户>你好<AI>").ids]])
    ids = twin.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=2,
        pad_token_id=0,
    )
    answer = load_tokenizer(talker).decode(ids[0, prompt.shape[1] :].tolist(), skip_special_tokens=True)
    assert out == answer + "\n" and answer
    assert err == "minitune: cut at 8 tokens (max_new_tokens)\n"


def test_an_adapter_finds_its_base(
    talker: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--adapter alone, or its folder as the model, use the base that it names; another base is warned of."""
    options = {"prompt": "你好", "sampling": SHORT, "device": "cpu"}
    said = []
    for model, lora in ((talker, adapter), (None, adapter), (adapter, None), (talker, None)):
        assert main(model and str(model), lora and str(lora), **options) == 0
        out, err = capsys.readouterr()
        assert "trained on" not in err
        said.append(out)
    assert said[0] == said[1] == said[2] != said[3]
    other = tmp_path / "other"
    shutil.copytree(talker, other)
    main(str(other), str(adapter), **options)
    assert f"{adapter} was trained on {talker}, not on {other}\n" in capsys.readouterr().err


def test_one_model_by_several_names(tmp_path: Path) -> None:
    folder = tmp_path / "MiniCPM-2B-sft-bf16"
    folder.mkdir()
    assert same_model("openbmb/MiniCPM-2B-sft-bf16", str(folder))
    assert same_model(str(folder), f"{folder}/")
    assert not same_model("openbmb/MiniCPM-1B-sft-bf16", str(folder))
    assert not same_model("smollm2", "openbmb/MiniCPM-1B-sft-bf16")


def test_what_cannot_be_opened_is_said_in_one_line(
    talker: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no model; give --model"):
        main()
    with pytest.raises(UserError, match=f"{tmp_path}: no adapter there"):
        main(str(talker), str(tmp_path))
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    del config["base_model_name_or_path"]
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="base_model_name_or_path is missing; give --model"):
        main(adapter=str(adapter))
    assert which(str(talker), str(adapter)) == (str(talker), str(adapter))
    monkeypatch.setenv("HOME", str(adapter.parent))
    assert which(str(talker), f"~/{adapter.name}") == (str(talker), str(adapter))
    with pytest.raises(UserError, match="^[^\n]*no-such-model: no such folder[^\n]*$"):
        main("no-such-model")


def test_lines_from_a_pipe(talker: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """No prompts, no banner: an answer a line; bytes outside UTF-8, CRLF and blank lines are fine; commands work."""
    lines = "你好\r\n\n/set max_new_tokens 3\n你好\n/clear\n/system 是\n你好".encode() + b" \xff\xfe\n/exit\nnever"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    sessions: list[Chat] = []
    monkeypatch.setattr(room, "Chat", lambda *a: sessions.append(Chat(*a)) or sessions[0])
    assert main(str(talker), sampling=SHORT, device="cpu") == 0
    out, err = capfd.readouterr()
    assert ">>>" not in out and "template" not in err
    assert "max_new_tokens=3" in err and out.endswith("\n")
    (session,) = sessions
    assert (session.system, session.sampling.max_new_tokens) == ("是", 3)
    assert [m.content for m in session.messages[::2]] == ["你好 \ufffd\ufffd"]


def test_a_closed_reader_is_no_error(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """`minitune chat --prompt … | head -c 1`"""
    from minitune.infer import terminal

    duplicated: list[int] = []

    def broken(_: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(terminal.os, "dup2", lambda old, new: duplicated.append(new))
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=broken, flush=lambda: None, fileno=lambda: 77))
    assert terminal.answer(chat, "你好") == 0
    assert duplicated == [77]

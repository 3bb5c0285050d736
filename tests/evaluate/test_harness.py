"""Our decoder as a model of lm-eval: its tasks give the numbers that lm-eval's own `hf` model gives, offline."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import load_model
from minitune.config import UserError
from minitune.data.template import Template
from minitune.evaluate.settings import EvaluateConfig
from minitune.infer.engine import Engine

pytest.importorskip("lm_eval", reason="tasks need lm-eval (extra tasks)")

from minitune.evaluate import harness  # noqa: E402  needs lm-eval

WORDS = ["你好", "我是", "谁吗", "今天", "ab", "cd", "ef", "gh", "好。", "is", "a", "day"]


def write_tasks(folder: Path) -> Path:
    """Three tasks of a folder: four choices of a letter, four of several words, free text; and a text's perplexity."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    rows = [
        {"q": words(3 + i % 9), "a": words(2), "b": words(1), "c": words(3), "d": words(2), "gold": i % 4}
        for i in range(12)
    ]
    texts = [{"text": words(30 * (1 + i))} for i in range(3)]  # longer than the model's 128 positions
    for name, data in (("rows", rows), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in data), encoding="utf-8"
        )

    def task(name: str, file: str, body: str) -> None:
        data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / file}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{body}", encoding="utf-8")

    choice = "output_type: multiple_choice\nnum_fewshot: 0\ndoc_to_target: gold\n"
    metrics = "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    ask = 'doc_to_text: "{{q}}\\nA. {{a}}\\nB. {{b}}\\nC. {{c}}\\nD. {{d}}\\n答:"\n'
    task("letters", "rows.jsonl", choice + ask + 'doc_to_choice: ["A", "B", "C", "D"]\n' + metrics)
    task("wordy", "rows.jsonl", choice + 'doc_to_text: "{{q}}"\ndoc_to_choice: "{{[a, b, c, d]}}"\n' + metrics)
    task("empty", "rows.jsonl", choice + 'doc_to_text: ""\ndoc_to_choice: "{{[a, b, c, d]}}"\n' + metrics)
    until = 'generation_kwargs:\n  until: ["。", "\\n"]\n  max_gen_toks: 24\n  do_sample: false\n'
    exact = "metric_list:\n  - metric: exact_match\n"
    task(
        "free",
        "rows.jsonl",
        'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n' + until + exact,
    )
    rolling = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    task("flow", "texts.jsonl", rolling + "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def models(twin: Path) -> tuple[harness.MinituneLM, Any]:
    """(ours, lm-eval's hf) over one folder."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(twin)
    decoder = load_model(twin, device="cpu", dtype="float32")
    template = Template.recorded(tokenizer, {}, twin)
    ours = harness.MinituneLM(decoder, template, Engine(decoder, tokenizer), tokens_per_pack=200)
    with harness.quiet():
        model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
        theirs = HFLM(pretrained=model, tokenizer=load_tokenizer(twin), batch_size=4)
    return ours, theirs


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def test_tasks_give_the_numbers_of_hf(models: tuple[Any, Any], tasks: Path) -> None:
    """Accuracies equal, perplexities to a part in 10,000; the metrics have lm-eval's names."""
    names, manager = harness.find_tasks("letters wordy,empty, free,flow", str(tasks))
    ours, theirs = (harness.run(model, names, manager, EvaluateConfig()) for model in models)
    assert set(ours) == {"letters", "wordy", "empty", "free", "flow"} and ours.keys() == theirs.keys()
    for task in ours:
        assert ours[task].keys() == theirs[task].keys()
        for metric, value in theirs[task].items():
            assert ours[task][metric] == pytest.approx(value, rel=1e-4), f"{task} {metric}"
    assert "acc" in ours["letters"] and "word_perplexity" in ours["flow"] and "exact_match" in ours["free"]
    accuracies = {ours[t]["acc"] for t in ("letters", "wordy", "empty")}
    assert accuracies - {0.0, 1.0}, "a task that is all wrong or all right compares little"


PAIRS = [
    ("你好", " 我是谁"),
    ("你好 ", "我是谁"),  # the space belongs to the continuation
    ("ab cd\n答:", "A"),
    ("ab cd\n答:", "B"),
    ("ab cd\n答:", "B"),  # asked twice
    ("ab cd\n答:", "AB"),
    ("", "今天"),
    ("今天 is " * 40, "a day"),  # longer than the context: cut at the left
    ("x", "𠮷"),  # bytes
]


def test_loglikelihoods_are_those_of_hf(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    with harness.quiet():
        want = theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
        got = ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    assert [g[1] for g in got] == [w[1] for w in want]
    assert [g[0] for g in got] == pytest.approx([w[0] for w in want], abs=2e-4)
    every = ours._loglikelihood_tokens([(None, [5, 6], [i]) for i in range(512)])
    assert [i for i, (_, likeliest) in enumerate(every) if likeliest] == [max(range(512), key=lambda i: every[i][0])]
    assert sum(math.exp(logprob) for logprob, _ in every) == pytest.approx(1, abs=1e-4)


def test_the_same_ids_cut_elsewhere(models: tuple[Any, Any]) -> None:
    """Two requests over the same ids, of which one asks for two tokens; against the logits of `transformers`."""
    ours, theirs = models
    ids = ours.tok_encode("ab cd\n答:AB")
    with torch.no_grad():
        logprobs = theirs.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    last, both = (float(sum(logprobs[i - 1, ids[i]] for i in range(len(ids) - n, len(ids)))) for n in (1, 2))
    got = ours._loglikelihood_tokens([(None, ids[:-2], ids[-2:]), (None, ids[:-1], ids[-1:])])
    assert [g[0] for g in got] == pytest.approx([both, last], abs=2e-4)


def test_rolling_and_texts_are_those_of_hf(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    texts = [("你好吗",), ("我是谁 ab cd " * 40,), ("x",)]
    asked = [
        ("你好", {"until": ["。"], "max_gen_toks": 20}),
        ("今天 is", {"until": ["a", "好"], "max_gen_toks": 9, "do_sample": False}),
        ("ab " * 90, {"until": [], "max_gen_toks": 16}),  # cut at the left to leave room
    ]
    with harness.quiet():
        want = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
        # one by one: hf pads a batch at the left, which this model's float32 shows in the last bits
        said = [theirs.generate_until(requests("generate_until", one), disable_tqdm=True)[0] for one in asked]
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) == pytest.approx(want, rel=1e-5)
    assert ours.generate_until(requests("generate_until", *asked)) == said
    with pytest.raises(UserError, match="generates 128 tokens"):
        ours.generate_until(requests("generate_until", ("x", {"until": [], "max_gen_toks": 128})))


def test_a_text_ends_before_the_tasks_stop(models: tuple[Any, Any]) -> None:
    """A stop that does come, in the middle of what the model says."""
    ours, theirs = models
    free = ours.generate_until(requests("generate_until", ("你好", {"until": [], "max_gen_toks": 20})))[0]
    stop = next(c for c in free[3:] if c not in free[:3])
    one = requests("generate_until", ("你好", {"until": [stop], "max_gen_toks": 20}))
    with harness.quiet():
        want = theirs.generate_until(one, disable_tqdm=True)
    assert ours.generate_until(one) == want == [free[: free.index(stop)]] and want != [free]


def test_one_bos(golden: Any) -> None:
    """A tokenizer that begins a text with BOS does not begin one twice that spells it."""
    tokenizer = load_tokenizer(golden("tokenizer-minicpm"))
    own = SimpleNamespace(tokenizer=tokenizer, prefix_token_id=tokenizer.bos_token_id)
    for text in ("你好", "<s>你好"):
        ids = harness.MinituneLM.tok_encode(own, text)  # type: ignore[arg-type]
        assert ids[0] == 1 and ids.count(1) == 1


def test_one_token_choices_share_a_pass(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four letters behind one question are one forward pass of the question."""
    ours, _ = models
    seen: list[int] = []
    plain = ours.decoder.hidden
    monkeypatch.setattr(ours.decoder, "hidden", lambda ids, *rest: seen.append(len(ids)) or plain(ids, *rest))
    context = ours.tok_encode("ab cd\n答:")
    ours._loglikelihood_tokens([(None, context, ours.tok_encode(c)) for c in "ABCD"])
    assert sum(seen) == len(context)


def test_a_users_turn(models: tuple[Any, Any]) -> None:
    """With the chat template the prompt is the string that a first turn of training is."""
    ours, _ = models
    text = ours.apply_chat_template([{"role": "user", "content": " 你是谁? "}])
    assert text == "<s><用户>你是谁?<AI>" and ours.tok_encode(text)[0] == 1 and ours.tok_encode(text)[1] != 1


def test_faults_are_one_line(tasks: Path, models: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task 'leters'; did you mean letters"):
        harness.find_tasks("letters,leters", str(tasks))
    with pytest.raises(UserError, match="--tasks is empty"):
        harness.find_tasks(" , ", "")
    gone = tmp_path / "gone.yaml"
    gone.write_text(
        (tasks / "letters.yaml").read_text(encoding="utf-8").replace("rows.jsonl", "no.jsonl"), encoding="utf-8"
    )
    (tmp_path / "gone.yaml").write_text(
        gone.read_text(encoding="utf-8").replace("task: letters", "task: gone"), encoding="utf-8"
    )
    names, manager = harness.find_tasks("gone", str(tmp_path))
    with pytest.raises(UserError, match=r"^the data of gone can't be had: [^\n]*$"):
        harness.run(models[0], names, manager, EvaluateConfig())


def test_real_tasks_are_known() -> None:
    """The names that people use are lm-eval's groups; their data are on a hub, which is not asked here."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    for name in ("ceval", "cmmlu"):
        group = harness.SHORT.get(name, name)
        said = [f.read_text(encoding="utf-8") for f in (folder / name).glob("*.yaml")]
        assert any(f"group: {group}\n" in text for text in said), group

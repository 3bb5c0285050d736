"""Real input: the embedded model learns 256 rows of the real data set, and other programs see what we see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import minitune
from minitune.checkpoint.gguf import embedded_default
from minitune.data import dataset
from minitune.data.template import Template
from minitune.export import export
from minitune.infer.engine import Engine, answer_all
from minitune.infer.request import Request
from minitune.infer.sampling import Sampling
from minitune.train.step import held_out_loss
from minitune.train.steps import make_loader

ROWS, HELD = 256, 16


@pytest.fixture(scope="module")
def run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, minitune.TrainConfig]:
    """One epoch of LoRA on the first 256 rows (some minutes on one core)."""
    folder = tmp_path_factory.mktemp("real")
    rows = json.loads((shared / "data" / "huanhuan.json").read_text(encoding="utf-8"))
    (folder / "learn.json").write_text(json.dumps(rows[:ROWS], ensure_ascii=False), encoding="utf-8")
    (folder / "held.json").write_text(json.dumps(rows[ROWS : ROWS + HELD], ensure_ascii=False), encoding="utf-8")
    config = minitune.TrainConfig(
        model="smollm2",
        data=str(folder / "learn.json"),
        eval_data=str(folder / "held.json"),
        output=str(folder / "out"),
        num_train_epochs=1,
        learning_rate=1e-3,
        dtype="float32",
        device="cpu",
    )
    minitune.train(config, quiet=True)
    return folder / "out", config


def test_it_learns_and_others_open_it(run: tuple[Path, minitune.TrainConfig], tmp_path: Path) -> None:
    """The held-out loss falls; PEFT gives our logits; the merged folder generates our greedy tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    output, config = run
    base = embedded_default()
    tokenizer = minitune.load_tokenizer(base)
    template = Template.recorded(tokenizer, {}, output)
    held = dataset.load(config.eval_data, template, config.max_length)
    before = minitune.load_model(base, device="cpu")
    batches = list(make_loader(config, held.rows, before.device, shuffle=False).batches())
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 16
    assert summary["eval_loss"] < held_out_loss(before, batches) - 0.1

    ours = minitune.load_model(base, adapter=output, device="cpu")
    ids = torch.tensor([held.rows[0].input_ids])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(output))
    with torch.no_grad():
        want = theirs(ids).logits
        got = ours.logits(ids)
    assert float((got - want).abs().max()) < 3e-5 * float(want.abs().max())

    export("smollm2", adapter=str(output), format="hf", output=str(tmp_path / "merged"), quiet=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    prompt = [i for i, label in zip(held.rows[0].input_ids, held.rows[0].labels, strict=True) if label < 0]
    greedy = merged.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, min_new_tokens=12)
    request = Request(tuple(prompt), Sampling(temperature=0, max_new_tokens=12))
    mine = answer_all(Engine(ours, tokenizer, slots=1), [request])[0].ids
    eos = template.stop_ids[0]
    until = mine.index(eos) if eos in mine else 12  # `min_new_tokens` forbids EOS there, nothing forbids it here
    assert greedy[0, len(prompt) :].tolist()[:until] == mine[:until] and until > 0

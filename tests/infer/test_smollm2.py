"""The embedded model, a real one: greedy text is that of `transformers`."""

from __future__ import annotations

import pytest
import torch

from minitune.checkpoint.gguf import embedded_default
from minitune.infer.chat import Message
from minitune.infer.engine import answer_all
from minitune.infer.request import Request
from minitune.infer.sampling import Sampling
from minitune.infer.session import Session, open_model

QUESTIONS = ("What is the capital of France?", "你是谁?", "Write one line about tea.", "2, 4, 8, 16,")
TOKENS = 20


@pytest.fixture(scope="module")
def session() -> Session:
    pytest.importorskip("gguf")
    return open_model("smollm2", dtype="float32", device="cpu", slots=12)


def test_greedy_text_is_that_of_transformers(session: Session) -> None:
    """Alone, and in a full batch that samples; as far as the best score leads by more than rounding."""
    from transformers import AutoModelForCausalLM

    template = session.templates[""]
    stops = frozenset(template.stop_ids)
    prompts = [tuple(template.prompt_ids([Message("user", q)])) for q in QUESTIONS]
    greedy = [Request(p, Sampling(temperature=0, max_new_tokens=TOKENS), stops) for p in prompts]
    noisy = [Request(p, Sampling(1.0, 0.9, max_new_tokens=TOKENS, seed=n), stops) for n, p in enumerate(prompts * 2)]
    engine = session.engine
    together = [h.ids for h in answer_all(engine, [*noisy[:5], *greedy, *noisy[5:]])[5:9]]
    alone = [answer_all(engine, [request])[0].ids for request in greedy]
    theirs = AutoModelForCausalLM.from_pretrained(embedded_default(), dtype=torch.float32).eval()
    compared = 0
    for prompt, one, many in zip(prompts, alone, together, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=list(stops),
            pad_token_id=0,
            repetition_penalty=1.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        sure = 0
        for scores in out.scores:
            best = scores[0].topk(2).values
            if best[0] - best[1] < 1e-3:
                break
            sure += 1
        expected = [i for i in out.sequences[0, len(prompt) :].tolist()[:sure] if i not in stops]
        assert one[:sure][: len(expected)] == many[:sure][: len(expected)] == expected
        compared += len(expected)
    assert compared > 2 * TOKENS


def test_a_seed_gives_the_same_text_in_any_company(session: Session) -> None:
    """Real weights, sampled: the same tokens alone, together, and behind a long prompt that is read in chunks."""
    template = session.templates[""]
    prompts = [tuple(template.prompt_ids([Message("user", q)])) for q in QUESTIONS]
    requests = [Request(p, Sampling(0.9, 0.95, max_new_tokens=8, seed=n)) for n, p in enumerate(prompts)]
    long = Request(tuple(range(1000, 1400)), Sampling(1.0, 1.0, max_new_tokens=8, seed=5))
    together = [h.ids for h in answer_all(session.engine, [long, *requests])][1:]
    assert together == [answer_all(session.engine, [request])[0].ids for request in requests]

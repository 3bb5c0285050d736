"""A tiny model that `transformers` opens too: random weights, a tokenizer of 512 tokens, scalars that are not one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from talker import write_tokenizer
from twins import hub_twin

# <用户>…<AI>… as a chat template, so that the folder is prompted as a MiniCPM
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<用户>{{ m['content'].strip() }}<AI>"
    "{% else %}{{ m['content'].strip() }}{{ eos_token if m['role'] == 'assistant' else '' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Granite folder of 512 tokens."""
    folder = tmp_path_factory.mktemp("twin")
    hub_twin(folder, vocab_size=512, max_position_embeddings=128, initializer_range=0.08)
    return write_tokenizer(folder, chat_template=CHAT)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Forty conversations, some of two turns."""
    rows = []
    for i in range(40):
        turns = [
            {"role": "user", "content": f"你是谁 {i}?"},
            {"role": "assistant", "content": f"我是 {i * i % 97}。" * (1 + i % 3)},
        ]
        if i % 4 == 0:
            turns += [{"role": "user", "content": "今天好吗?"}, {"role": "assistant", "content": "好。"}]
        rows.append({"messages": turns})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return path

"""Ollama's Modelfile says what the chat template says; where it can't, it says nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitune.checkpoint.embedded import embedded_default
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.config import TemplateConfig
from minitune.data.template import Template
from minitune.export import modelfile
from minitune.export.report import Report

TALKS = [
    [("user", "你好")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", 'Say "{{ x }}"')],
    [("user", "a\nb"), ("assistant", "c"), ("user", "d"), ("assistant", "e"), ("user", "f")],
]
GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
	var all [][]Message
	json.Unmarshal([]byte(os.Args[2]), &all)
	t := template.Must(template.New("").Parse(os.Args[1]))
	for _, messages := range all {
		t.Execute(os.Stdout, map[string]any{"Messages": messages})
		os.Stdout.WriteString("\\x00")
	}
}
"""


def templates(golden: Callable[[str], Path]) -> list[Template]:
    minicpm = load_tokenizer(golden("tokenizer-minicpm"))
    smollm2 = load_tokenizer(embedded_default())
    return [
        Template(minicpm, TemplateConfig(name="minicpm")),
        Template(minicpm, TemplateConfig(name="minicpm", bos=False), tuned=False),
        Template(smollm2, TemplateConfig(name="model")),
    ]


def rendered(template: Template, talk: list[tuple[str, str]]) -> str:
    plain = [{"role": role, "content": content} for role, content in talk]
    return template.tokenizer.apply_chat_template(
        plain, chat_template=template.chat_template(), tokenize=False, add_generation_prompt=True
    )


def walk(text: str, talk: list[tuple[str, str]]) -> str:
    """The few words of Go's template language that are used, read here by themselves."""
    default = re.match(r'\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}(.*?)\{\{ end \}\}', text, re.S)
    body = text[default.end() :] if default else text
    found = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", body, re.S)
    assert found, text
    blocks = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', found[1], re.S))
    start = default[1] if default and talk[0][0] != "system" else ""
    return start + "".join(blocks[role].replace("{{ .Content }}", content) for role, content in talk) + found[2]


def test_the_same_text(golden: Callable[[str], Path], tmp_path: Path) -> None:
    """Ollama's text is the chat template's, BOS aside, which Ollama puts in front itself where the file says so."""
    for template in templates(golden):
        found = modelfile.blocks(template)
        assert found is not None
        start = "<s>" if template.config.name == "minicpm" and template.config.bos else ""
        for talk in TALKS:
            assert start + walk(found.go(), talk) == rendered(template, talk)


def test_go_itself(golden: Callable[[str], Path], tmp_path: Path) -> None:
    """Go's own text/template, which Ollama is built on. Optional: runs where Go is installed."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed")
    (tmp_path / "main.go").write_text(GO, encoding="utf-8")
    messages = json.dumps([[{"Role": r, "Content": c} for r, c in talk] for talk in TALKS])
    for template in templates(golden):
        found = modelfile.blocks(template)
        assert found is not None
        command = ["go", "run", str(tmp_path / "main.go"), found.go(), messages]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        start = "<s>" if template.config.name == "minicpm" and template.config.bos else ""
        assert [start + text for text in done.stdout.split("\0")[:-1]] == [rendered(template, t) for t in TALKS]


def test_the_file(golden: Callable[[str], Path], tmp_path: Path) -> None:
    """FROM, TEMPLATE, the ends; a template that is more than blocks is not translated, and that is said."""
    tuned, _, smollm2 = templates(golden)
    report = Report(tmp_path)
    text = modelfile.modelfile("x.gguf", tuned, report)
    assert "FROM ./x.gguf\n" in text and 'PARAMETER stop "</s>"' in text and 'PARAMETER stop "<用户>"' in text
    assert report.notes == [] and text.count('"""') == 2
    assert 'PARAMETER stop "<|im_end|>"\n' in modelfile.modelfile("x.gguf", smollm2, report)
    other: Any = smollm2.tokenizer
    kept = other.chat_template
    try:
        other.chat_template = (
            "{{ messages | length }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}<|im_end|>"
        )
        text = modelfile.modelfile("x.gguf", Template(other, TemplateConfig(name="model")), report)
    finally:
        other.chat_template = kept
    assert "TEMPLATE" not in text and "has no TEMPLATE" in report.notes[0]

"""The whole command on one card: `minitune train`, three epochs of the real data, from Enter to a saved adapter.

    python bench/train_command.py [--data ../shared/data/huanhuan.json] [--tokenizer ../shared/golden/tokenizer-minicpm]

A hub folder of MiniCPM-2B's shape is written with random weights first, and so lies in the page cache. The first run
finds no compiled kernels and no cached rows, the second finds both. Wall seconds of the process, and the command's own
`--profile` line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARED = Path(__file__).resolve().parents[2] / "shared"
CONFIG = {
    "architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 2304, "intermediate_size": 5760, "num_hidden_layers": 40,
    "num_attention_heads": 36, "num_key_value_heads": 36, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "vocab_size": 122753, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "torch_dtype": "bfloat16",
    "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip


def write_hub_folder(folder: Path, tokenizer: Path) -> None:
    """Random weights in the hub's layout and names, dealt round four shards."""
    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    H, F, V = 2304, 5760, 122753
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    for i in range(40):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (H, H) for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (F, H) for n in ("gate", "up")} | {f"{at}mlp.down_proj.weight": (H, F)}
        shapes |= {f"{at}{n}_layernorm.weight": (H,) for n in ("input", "post_attention")}
    names, index = list(shapes), {}
    for number in range(4):
        part, file = names[number::4], f"model-{number + 1:05d}-of-00004.safetensors"
        tensors = {}
        for name in part:
            shape = shapes[name]
            made = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device="cuda") * 0.02
            tensors[name] = made.to("cpu", torch.bfloat16)
            index[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "huanhuan.json")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "golden" / "tokenizer-minicpm")
    arguments, settings = parser.parse_known_args()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        write_hub_folder(folder, arguments.tokenizer)
        torch.cuda.empty_cache()
        environment = os.environ | {"TRITON_CACHE_DIR": f"{work}/triton", "MINITUNE_ROWS_CACHE": f"{work}/rows"}
        for what in ("cold", "warm"):
            command = [sys.executable, "-m", "minitune", "train", "--model", str(folder), "--data", str(arguments.data)]
            command += ["--output", f"{work}/{what}", "--num_train_epochs", "3", "--profile", "true", *settings]
            began = time.perf_counter()
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            seconds = time.perf_counter() - began
            print(f"{what}: {seconds:.1f} s, exit status {run.returncode}")
            said = (run.stdout + run.stderr).splitlines()
            print("\n".join(f"  {line}" for line in (said if run.returncode else said[-14:])), flush=True)


if __name__ == "__main__":
    main()

"""Settings in any program's words: translated with the meaning that they have there, or refused by name; never passed
over in silence. Files of the shape that each program publishes are run end to end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talker import write_rows

from minitune import cli
from minitune.config import TrainConfig, UserError, build, flat_fields, read_yaml, to_yaml, version
from minitune.foreign import tables
from minitune.foreign.reading import Source, read

KNOWN = flat_fields(TrainConfig)
Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("quick")


def reading(values: dict[str, Any], *later: dict[str, Any]) -> Any:
    names = ["lora.yaml", "the command line"]
    return read([Source(n, v) for n, v in zip(names, (values, *later), strict=False)], KNOWN)


def refusal(values: dict[str, Any], *later: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        reading(values, *later)
    said = str(error.value)
    assert "\n" not in said and len(said) < 500
    return said


# What a name means


LF = {"stage": "sft", "finetuning_type": "lora", "model_name_or_path": "m", "output_dir": "o"}
SWIFT = {"model": "m", "tuner_type": "lora", "dataset": "rows.jsonl", "output_dir": "o", "max_length": 1024}
AXOLOTL = {"base_model": "m", "sequence_len": 256, "output_dir": "o", "learning_rate": 0.0002}

# (what is given, what it must become): the meanings are those of the programs' own source and manuals.
MEANINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # LLaMA-Factory: alpha is 2 x rank, no dropout, every linear, 2048 tokens, 8 x 1 rows, 5e-5, a line break
    (LF, {"method": "lora", "lora_alpha": 16.0, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}),
    (LF, {"max_length": 2048, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}),
    (LF, {"learning_rate": 5e-5, "template.join": "\n"}),
    (LF | {"lora_rank": 64}, {"lora_r": 64, "lora_alpha": 128.0}),
    (LF | {"lora_rank": 64, "lora_alpha": None}, {"lora_alpha": 128.0}),
    (LF | {"lora_rank": 64, "lora_alpha": 16}, {"lora_alpha": 16.0}),
    (LF | {"lora_target": "q_proj,v_proj"}, {"lora_target_modules": ("q_proj", "v_proj")}),
    (LF | {"template": "cpm"}, {"template.name": "minicpm"}),
    (LF | {"template": "cpm4"}, {"template.name": "model"}),
    (LF | {"val_size": 0.1}, {"eval_fraction": 0.1}),
    (LF | {"val_size": 100}, {"eval_rows": 100}),
    (LF | {"max_samples": 50}, {"max_samples": 50}),
    (LF | {"eval_strategy": "steps", "eval_steps": 7}, {"eval_steps": 7}),
    (LF | {"eval_strategy": "steps", "logging_steps": 5}, {"eval_steps": 5}),
    (LF | {"eval_strategy": "epoch", "eval_steps": 7}, {"eval_steps": 0}),
    (LF | {"evaluation_strategy": "epoch", "save_strategy": "epoch", "save_steps": 9}, {"eval_steps": 0, "save_steps": 0}),
    (LF | {"save_strategy": "steps"}, {"save_steps": 500}),
    (LF | {"bf16": True}, {"dtype": "bfloat16"}),
    (LF | {"bf16": False, "fp16": True}, {"dtype": "float16"}),
    (LF | {"pure_bf16": True}, {"dtype": "bfloat16"}),
    (LF | {"warmup_ratio": 0.1}, {"warmup_ratio": 0.1}),
    (LF | {"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
    (LF | {"warmup_steps": 100}, {"warmup_steps": 100}),
    (LF | {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, {"lr_scheduler_type": "constant", "warmup_steps": 3}),
    (LF | {"lr_scheduler_type": "constant", "warmup_steps": 3}, {"lr_scheduler_type": "constant", "warmup_steps": 0}),
    (LF | {"packing": True, "cutoff_len": 1024, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"tokens_per_step": 8192}),
    (LF | {"neat_packing": True, "cutoff_len": 512}, {"tokens_per_step": 4096}),
    (LF | {"disable_gradient_checkpointing": True}, {"gradient_checkpointing": "false"}),
    (LF | {"resume_from_checkpoint": None}, {"resume": ""}),
    (LF | {"finetuning_type": "full"}, {"method": "full", "learning_rate": 5e-5}),
    (LF | {"max_steps": -1}, {"max_steps": 0}),
    (LF | {"finetuning_type": "full", "optim": "adamw_bnb_8bit"}, {"optim": "adamw_8bit"}),
    (LF | {"finetuning_type": "full", "optim": "adamw_torch_fused"}, {"optim": "adamw"}),
    (LF | {"finetuning_type": "full", "optim": "adamw_8bit_in_backward"}, {"optim": "adamw_8bit_in_backward"}),
    (LF | {"optim": "adamw_torch", "report_to": "none", "do_train": True}, {"method": "lora"}),
    # the tutorial's LoraConfig and TrainingArguments: our own names and defaults
    ({"r": 8, "lora_alpha": 32, "task_type": "TaskType.CAUSAL_LM", "inference_mode": False}, {"lora_r": 8, "lora_alpha": 32.0}),
    ({"LoraConfig.r": 4, "TrainingArguments.num_train_epochs": 1}, {"lora_r": 4, "num_train_epochs": 1.0}),
    (
        {"deepspeed": "./ds_config.json", "save_on_each_node": "True", "logging_steps": "10"},
        {"deepspeed": "./ds_config.json", "logging_steps": 10},
    ),
    ({"target_modules": ["q_proj", "v_proj"]}, {"lora_target_modules": ("q_proj", "v_proj")}),
    ({"target_modules": r".*\.(q|v)_proj"}, {"lora_target_modules": r".*\.(q|v)_proj"}),
    ({"lr_scheduler_type": "SchedulerType.COSINE"}, {"lr_scheduler_type": "cosine"}),
    ({"use_cpu": True}, {"device": "cpu"}),
    ({"max_seq_length": 99, "truncation_mode": "keep_start", "completion_only_loss": True}, {"max_length": 99, "overlong": "cut"}),
    ({"packing": True, "max_seq_length": 100}, {"tokens_per_step": 1600}),
    ({"packing": False}, {}),
    ({"model_init_kwargs.torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
    ({"use_peft": False}, {"method": "full"}),
    ({"dtype": "bf16"}, {"dtype": "bfloat16"}),
    ({"optim": "adamw_bnb_8bit", "method": "lora"}, {"method": "lora"}),
    # ms-swift: 16 rows whatever the batch, cosine, decay 0.1, beta2 0.95, overlong rows deleted
    (SWIFT, {"gradient_accumulation_steps": 16, "per_device_train_batch_size": 1, "lr_scheduler_type": "cosine"}),
    (SWIFT, {"weight_decay": 0.1, "adam_beta2": 0.95, "overlong": "drop", "lora_dropout": 0.05, "template.join": "\n"}),
    (SWIFT | {"per_device_train_batch_size": 3}, {"gradient_accumulation_steps": 6}),
    (SWIFT | {"truncation_strategy": "right", "use_hf": True}, {"overlong": "cut", "source": "huggingface"}),
    (SWIFT | {"split_dataset_ratio": 0.01, "target_modules": "all-linear"}, {"eval_fraction": 0.01}),
    # axolotl: every parameter where no adapter is named, one epoch, cosine, 3 % warm-up
    (AXOLOTL, {"method": "full", "num_train_epochs": 1.0, "warmup_ratio": 0.03, "overlong": "drop"}),
    (AXOLOTL | {"adapter": "lora", "lora_target_linear": True}, {"method": "lora", "lora_target_modules": "all-linear"}),
    (AXOLOTL | {"adapter": "lora", "optimizer": "adamw_8bit", "lora_dropout": 0.05}, {"lora_dropout": 0.05}),
    (AXOLOTL | {"sample_packing": True, "micro_batch_size": 2, "gradient_accumulation_steps": 3}, {"tokens_per_step": 1536}),
    (AXOLOTL | {"val_set_size": 0.05, "evals_per_epoch": 4}, {"eval_fraction": 0.05, "eval_steps": 0}),
    (AXOLOTL | {"excess_length_strategy": "truncate", "bf16": "auto"}, {"overlong": "cut"}),
    (AXOLOTL | {"gradient_checkpointing": "offload", "warmup_steps": 10}, {"gradient_checkpointing": "true", "warmup_steps": 10}),
    (AXOLOTL | {"chat_template": "tokenizer_default", "special_tokens.pad_token": "<pad>"}, {"template.name": "model"}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "wanted"), MEANINGS, ids=[str(i) for i in range(len(MEANINGS))])
def test_what_a_name_means(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    got = reading(given).values
    assert {name: got.get(name) for name in wanted} == wanted


REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (LF | {"stage": "dpo", "pref_beta": 0.1}, ("lora.yaml: stage: dpo is not supported", "stage: sft")),
    (LF | {"stage": "pt"}, ("stage: pt",)),
    (LF | {"finetuning_type": "freeze"}, ("finetuning_type", "lora, full")),
    (LF | {"use_dora": True}, ("use_dora: true is not supported", "leave it out")),
    (LF | {"loraplus_lr_ratio": 16.0}, ("loraplus_lr_ratio",)),
    (LF | {"use_galore": True, "galore_rank": 8}, ("use_galore",)),
    (LF | {"pissa_init": True, "use_dora": True}, ("pissa_init", "refused too: use_dora")),
    (LF | {"quantization_bit": 8}, ("quantization_bit: 8", "write 4")),
    (LF | {"quantization_bit": 4, "finetuning_type": "full"}, ("quantization_bit: 4", "method: lora")),
    (LF | {"template": "alpaca"}, ("template: alpaca", "template: cpm")),
    (LF | {"train_on_prompt": True}, ("train_on_prompt", "only answers are learned")),
    (LF | {"mask_history": True}, ("mask_history", '"weight": 0')),
    (LF | {"default_system": "你是甄嬛。"}, ("default_system", "`system`")),
    (LF | {"adapter_name_or_path": "a"}, ("adapter_name_or_path", "minitune export")),
    (LF | {"val_size": 1}, ("val_size: 1", "below 1")),
    (LF | {"export_dir": "merged", "export_size": 5}, ("export_dir", "minitune export --config")),
    (LF | {"optim": "adafactor"}, ("optim: adafactor", "adamw_torch")),
    (LF | {"lr_scheduler_type": "polynomial"}, ("lr_scheduler_type: polynomial", "linear, cosine or constant")),
    (LF | {"eval_strategy": "often"}, ("eval_strategy: often", "no, steps or epoch")),
    (LF | {"save_steps": 0.5}, ("save_steps: 0.5", "number of steps")),
    (LF | {"tokenized_path": "saves"}, ("tokenized_path",)),
    (LF | {"neftune_noise_alpha": 5}, ("neftune_noise_alpha",)),
    (LF | {"push_to_hub": True}, ("push_to_hub",)),
    (LF | {"cutof_len": 5}, ("unknown setting 'cutof_len'", "did you mean")),
    (LF | {"preprocessing_num_worker": 5}, ("unknown setting", "did you mean preprocessing_num_workers")),
    ({"modules_to_save": ["embed_tokens"]}, ("modules_to_save: embed_tokens", "--method full")),
    ({"bias": "all"}, ("bias: all", "bias: none")),
    ({"task_type": "SEQ_CLS"}, ("task_type: SEQ_CLS", "CAUSAL_LM")),
    ({"assistant_only_loss": False}, ("assistant_only_loss: false", "only answers")),
    ({"dataset_text_field": "text"}, ("dataset_text_field",)),
    ({"load_in_8bit": True}, ("load_in_8bit",)),
    ({"data_seed": 7}, ("data_seed: 7",)),
    ({"model_revision": "v2"}, ("model_revision: v2", "minitune download")),
    (SWIFT | {"truncation_strategy": "left"}, ("truncation_strategy: left", "delete or right")),
    (SWIFT | {"loss_scale": "all"}, ("loss_scale: all",)),
    (SWIFT | {"tuner_type": "adalora"}, ("tuner_type", "lora, full")),
    (AXOLOTL | {"rl": "dpo"}, ("rl: dpo",)),
    (AXOLOTL | {"batch_size": 8}, ("batch_size: 8", "micro_batch_size")),
    (AXOLOTL | {"train_on_inputs": True}, ("train_on_inputs",)),
    (AXOLOTL | {"datasets": [{"path": "tatsu-lab/alpaca", "type": "alpaca"}]}, ("tatsu-lab/alpaca is no file",)),
    (AXOLOTL | {"special_tokens.eos_token": "<end>"}, ("special_tokens.eos_token",)),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=[list(g)[-1] for g, _ in REFUSED])
def test_refused_by_name(given: dict[str, Any], words: tuple[str, ...]) -> None:
    said = refusal(given)
    assert all(word in said for word in words) and said.startswith("lora.yaml: "), said


def test_a_4_bit_base_is_qlora() -> None:
    """In whatever words; with every parameter learning it is refused."""
    for given in (LF | {"quantization_bit": 4}, AXOLOTL | {"adapter": "qlora", "load_in_4bit": True}):
        assert reading(given | {"bnb_4bit_quant_type": "nf4"}).values["method"] == "qlora"
    assert reading(AXOLOTL | {"adapter": "qlora"}).values["method"] == "qlora"
    assert "every parameter" in refusal(LF | {"quantization_bit": 4, "finetuning_type": "full"})
    assert reading(LF | {"quantization_bit": None, "load_in_4bit": False}).values["method"] == "lora"


def test_nothing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each given name stands in the notes, under one of the heads, or is a setting of ours as it stands."""
    given = LF | {
        "lora_rank": 8, "lora_target": "all", "template": "cpm", "cutoff_len": 256, "preprocessing_num_workers": 16,
        "overwrite_cache": True, "logging_steps": 10, "plot_loss": True, "bf16": True, "ddp_timeout": 180000000,
        "report_to": "none", "use_dora": False, "fp16": False, "packing": False, "optim": "adamw_torch",
        "eval_strategy": "epoch", "quantization_bit": None, "galore_rank": 16, "hf_hub_token": "hf_secret",
    }  # fmt: skip
    notes = "\n".join(reading(given).notes)
    text = " ".join(notes.split())
    for name in given:
        assert name in KNOWN or re.search(rf"\b{name}\b", text), name
    assert "lora_alpha 16" in text and "lora_dropout 0," in text and "LLaMA-Factory's defaults" in text
    assert "hf_secret" not in text
    assert max(map(len, notes.splitlines())) <= 100
    # plain names need no explanation
    assert reading({"model": "m", "output_dir": "o", "lora_rank": 4, "template.bos": False}).notes == []


def test_every_argument_of_transformers_and_peft() -> None:
    """Each field of their classes is spoken of, and the value that it has by default is understood."""
    peft = pytest.importorskip("peft")
    from transformers import TrainingArguments

    fields = [*dataclasses.fields(TrainingArguments), *dataclasses.fields(peft.LoraConfig)]
    assert len(fields) > 140
    for field in fields:
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore
        if not isinstance(default, str | int | float | bool | list | dict | type(None)):
            default = str(default)
        for value in (default, str(default)):
            got = reading({field.name: value})
            said = " ".join(got.notes)
            assert field.name in KNOWN or field.name in said or got.values or value in (None, "None", ""), field.name


def rest(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# LLaMA-Factory's own names (hparams/*.py and the published files), each with a value that asks for nothing special.
LF_NAMES = {
    **rest("media_dir eval_dataset tokenized_path interleave_probs tool_format default_system adapter_folder cache_dir "
        "additional_target loraplus_lr_ratio quantization_bit rope_scaling mixture_of_depths hf_hub_token ms_hub_token "
        "om_hub_token add_tokens add_special_tokens new_special_tokens_config max_samples eval_num_beams run_name "
        "early_stopping_steps moe_aux_loss_coef quantization_device_map deepspeed resume_from_checkpoint "
        "export_quantization_bit ref_model reward_model swanlab_api_key hyper_parallel_args tokenized_path",
        None,
    ),
    **rest("train_on_prompt mask_history streaming eval_on_each_dataset use_dora pissa_init pissa_convert use_galore "
        "use_apollo use_badam use_adam_mini use_muon use_llama_pro use_mca use_dft_loss use_asft_loss use_eaft_loss "
        "use_swanlab shift_attn train_from_scratch resize_vocab disable_shuffling use_kt fp8 do_predict pure_bf16 fp16 "
        "predict_with_generate use_unsloth enable_liger_kernel neat_packing preserve_thinking "
        "upcast_layernorm print_param_status compute_accuracy enable_torch_profiler",
        False,
    ),
    **rest("do_train overwrite_cache plot_loss overwrite_output_dir ignore_pad_token_for_loss", True),
    **rest("use_fast_tokenizer low_cpu_mem_usage use_kv_cache double_quantization", True),
    **rest("preprocessing_num_workers dataloader_num_workers preprocessing_batch_size", 16),
    **rest("buffer_size ddp_timeout galore_rank badam_verbose pref_beta kto_chosen_weight", 2),
    **rest("image_max_pixels video_fps audio_sampling_rate vllm_maxlen freeze_trainable_layers", 2),
    **rest("ppo_epochs loraplus_lr_embedding oft_block_size asft_alpha ray_num_workers pissa_iter", 2),
    "mix_strategy": "concat", "flash_attn": "fa2", "quantization_method": "bnb", "infer_backend": "huggingface",
    "model_revision": "main", "report_to": "none", "dataset_dir": "data", "save_only_model": False,
    "trust_remote_code": True, "enable_thinking": True, "per_device_eval_batch_size": 1, "quantization_type": "nf4",
    "gradient_checkpointing": True, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42, "use_rslora": False,
}  # fmt: skip


def test_every_name_of_llama_factory() -> None:
    """At rest each is understood, and each is spoken of."""
    said = " ".join(" ".join(reading(LF | LF_NAMES).notes).split())
    for name, value in LF_NAMES.items():
        assert value is None or name in KNOWN or re.search(rf"\b{name}\b", said), name


# Two sources, two names


def test_flags_win_and_contradictions_are_faults() -> None:
    """A later source wins under any name; in one source two names with two values are refused, both named."""
    assert reading(LF | {"cutoff_len": 2048}, {"max_length": "512"}).values["max_length"] == 512
    assert reading(LF | {"lora_rank": 8}, {"lora_r": "32"}).values["lora_alpha"] == 64.0
    assert reading({"max_length": 2048}, {"cutoff-len": "512"}).values["max_length"] == 512
    assert reading(LF | {"bf16": True}, {"dtype": "float32"}).values["dtype"] == "float32"
    assert "dtype" not in reading(LF | {"bf16": True}, {"bf16": "false"}).values
    assert reading(LF | {"eval_strategy": "epoch"}, {"eval_steps": "5"}).values["eval_steps"] == 5
    assert reading(LF | {"use_dora": True}, {"use_dora": "false"}).values["method"] == "lora"
    assert reading(LF | {"val_size": 0.1}, {"eval_fraction": "0.2"}).values["eval_fraction"] == 0.2
    assert reading({"lora_r": 8, "lora_rank": 8, "r": 8}).values["lora_r"] == 8
    for given, words in (
        ({"cutoff_len": 512, "max_length": 1024}, ("lora.yaml", "cutoff_len (512)", "max_length (1024)")),
        ({"r": 8, "lora_rank": 16}, ("r (8)", "lora_rank (16)", "lora_r")),
        ({"bf16": True, "fp16": True}, ("bf16", "fp16", "dtype")),
        ({"lora-rank": 8, "lora_rank": 16}, ("lora-rank", "lora_rank", "keep one")),
        (LF | {"finetuning_type": "full", "method": "lora"}, ("finetuning_type (full)", "method (lora)")),
    ):
        said = refusal(given)
        assert all(word in said for word in words), said
    assert "the command line: " in refusal({}, {"cutoff_len": "1", "max_length": "2"})


def test_a_name_that_a_file_sets_twice(tmp_path: Path) -> None:
    """YAML itself would let the later one win in silence; nested and in lists too."""
    path = tmp_path / "twice.yaml"
    for text, line in (("seed: 1\nlora_r: 8\nseed: 2\n", 3), ("template:\n  bos: true\n  bos: false\n", 3)):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=rf"twice.yaml: line {line}: (seed|bos) is set a second time"):
            read_yaml(path)
    path.write_text("datasets:\n- {path: a}\n- {path: b}\n", encoding="utf-8")
    assert read_yaml(path) == {"datasets": [{"path": "a"}, {"path": "b"}]}


# Data sets by name


def info(folder: Path, **entries: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    for name in ("a.json", "b.json"):
        write_rows(folder / name, 2)
    return LF | {"dataset_dir": str(folder)}


def test_dataset_info(tmp_path: Path) -> None:
    """A name becomes the file that dataset_info.json gives it; what does not fit is refused with the mend."""
    role = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    fine = {
        "plain": {"file_name": "a.json"},
        "columns": {"file_name": "a.json", "columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}},
        "turns": {"file_name": "b.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": role | {"system_tag": "system"}},
        "sharegpt": {"file_name": "b.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    }  # fmt: skip
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "question": ({"file_name": "a.json", "columns": {"prompt": "question"}}, "columns.prompt is question: rename it to instruction"),
        "speaker": ({"file_name": "a.json", "formatting": "sharegpt", "tags": role | {"user_tag": "speaker"}}, "tags.user_tag is speaker"),
        "hub": ({"hf_hub_url": "org/name", "file_name": "a.json"}, "not on this machine (hf_hub_url)"),
        "gone": ({"file_name": "gone.json"}, "gone.json is not a file"),
        "rank": ({"file_name": "a.json", "ranking": True}, "preferences"),
        "some": ({"file_name": "a.json", "num_samples": 5}, "num_samples 5"),
        "image": ({"file_name": "a.json", "columns": {"images": "images"}}, "columns.images"),
        "mixed": ({"file_name": "a.json", "formatting": "sharegpt", "tags": {"role_tag": "role"}}, "role and content"),
    }  # fmt: skip
    base = info(tmp_path / "data", **fine, **{name: entry for name, (entry, _) in wrong.items()})
    for name in fine:
        got = reading(base | {"dataset": name}).values["data"]
        assert got == str(tmp_path / "data" / fine[name]["file_name"])  # type: ignore[operator]
    for name, (_, words) in wrong.items():
        said = refusal(base | {"dataset": name})
        assert words in said and said.startswith("lora.yaml: dataset: "), said
    assert "did you mean plain" in refusal(base | {"dataset": "plane"})
    both = reading(base | {"dataset": "plain, turns", "eval_dataset": "columns"}).values
    assert both["data"] == f"{tmp_path}/data/a.json,{tmp_path}/data/b.json" and both["eval_data"].endswith("a.json")
    assert "dataset_info.json can't be read" in refusal(LF | {"dataset": "plain", "dataset_dir": str(tmp_path)})
    # a file is a file; without LLaMA-Factory's marks a name is one too
    assert reading(LF | {"dataset": f"{tmp_path}/data/a.json"}).values["data"] == f"{tmp_path}/data/a.json"
    assert reading({"dataset": "rows.json"}).values["data"] == "rows.json"
    note = " ".join(reading(base | {"dataset": "half"} | info(tmp_path / "data", half={"file_name": "a.json", "columns": {"prompt": "instruction", "response": "output"}})).notes)  # fmt: skip
    assert "input, system, history of a row count here" in " ".join(note.split())


# End to end on a tiny model


def weights(folder: Path) -> bytes:
    found = [f for f in ("adapter_model.safetensors", "model.safetensors") if (folder / f).is_file()]
    return (folder / found[0]).read_bytes()


LLAMA_FACTORY_FILE = """
### model
model_name_or_path: {model}
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: {method}
lora_rank: 4
lora_target: all

### dataset
dataset: zhenhuan
dataset_dir: {data}
template: cpm
cutoff_len: 256
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: {output}
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: {rate}
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
fp16: false
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
val_size: 2
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 2
"""
TUTORIAL_FLAGS = (
    "--model_path {model} --dataset {data}/rows.json --output_dir={output} --per_device_train_batch_size=2 "
    "--gradient_accumulation_steps=2 --logging_steps=10 --num_train_epochs=1 --save_steps=500 --learning_rate=1e-4 "
    "--save_on_each_node=True --task_type CAUSAL_LM --target_modules q_proj v_proj "
    "--inference_mode False --r 8 --lora_alpha 32 --lora_dropout 0.1"
)
SWIFT_FLAGS = (
    "--model {model} --train_type lora --dataset {data}/rows.json --torch_dtype float32 --num_train_epochs 1 "
    "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --learning_rate 1e-4 --lora_rank 8 "
    "--lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 4 --eval_steps 50 --save_steps 50 "
    "--save_total_limit 2 --logging_steps 5 --max_length 256 --output_dir {output} --warmup_ratio 0.05 "
    "--dataset_num_proc 4 --dataloader_num_workers 4 --model_author swift --model_name swift-robot"
)
AXOLOTL_FILE = """
base_model: {model}
load_in_8bit: false
load_in_4bit: false
datasets:
  - path: {data}/rows.json
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: {output}
sequence_len: 128
sample_packing: true
eval_sample_packing: true
adapter: lora
lora_model_dir:
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - q_proj
  - v_proj
wandb_project:
wandb_entity:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
OURS_LF = "--template.name minicpm --template.join {break} --max_length 256 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --num_train_epochs 1 --lr_scheduler_type cosine --warmup_ratio 0.1 --eval_rows 2 --max_samples 1000"
# name: (foreign file or flags, the same run in our words)
PROGRAMS = {
    "LLaMA-Factory lora": (LLAMA_FACTORY_FILE, f"--lora_r 4 --lora_alpha 8 --lora_dropout 0 --lora_target_modules all-linear --learning_rate 1e-4 {OURS_LF}"),
    "LLaMA-Factory full": (LLAMA_FACTORY_FILE, f"--method full --learning_rate 1e-5 {OURS_LF}"),
    "tutorial": (TUTORIAL_FLAGS, "--lora_target_modules q_proj,v_proj --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --num_train_epochs 1"),
    "ms-swift": (SWIFT_FLAGS, "--lora_target_modules all-linear --lora_dropout 0.05 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --num_train_epochs 1 --max_length 256 --overlong drop --weight_decay 0.1 --adam_beta2 0.95 --lr_scheduler_type cosine --warmup_ratio 0.05 --template.join {break}"),
    "axolotl": (AXOLOTL_FILE, "--lora_r 16 --lora_dropout 0.05 --lora_target_modules q_proj,v_proj --tokens_per_step 512 --num_train_epochs 1 --max_length 128 --overlong drop --lr_scheduler_type cosine --learning_rate 2e-4 --warmup_ratio 0.1 --eval_fraction 0.1 --template.join {break}"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_whole_run(run: Run, model: Path, tmp_path: Path, name: str) -> None:
    """The foreign file or flags give the very weights that the same run in our words gives."""
    foreign, ours = PROGRAMS[name]
    data = tmp_path / "data"
    info(data, zhenhuan={"file_name": "rows.json"})
    rows = [{"instruction": f"你是谁 {i}?", "input": "答" * (i % 3), "output": f"我是 {i * i % 97}。" * (1 + i % 4)} for i in range(14)]  # fmt: skip
    (data / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    method = name.rpartition(" ")[2]
    text = foreign.format(model=model, data=data, output=tmp_path / "theirs", method=method, rate="1.0e-5" if method == "full" else "1.0e-4")  # fmt: skip
    same = ["--device", "cpu", "--dtype", "float32"]
    if foreign.startswith("--"):
        argv = text.split()
    else:
        (tmp_path / "theirs.yaml").write_text(text, encoding="utf-8")
        argv = ["--config", str(tmp_path / "theirs.yaml")]
    code, _, err = run("train", *argv, *same)
    assert code == 0, err
    assert "in minitune's words" in err and ("LLaMA-Factory's defaults" in err) == name.startswith("LLaMA")
    words = ["\n" if word == "{break}" else word for word in ours.split()]
    base = ["--model", model, "--data", data / "rows.json", "--output", tmp_path / "ours"]
    assert run("train", *base, *words, *same)[0] == 0
    assert weights(tmp_path / "theirs") == weights(tmp_path / "ours")
    # the run's own record needs no translation any more
    record = read_yaml(tmp_path / "theirs" / "run.yaml")
    assert build(TrainConfig, record) == build(TrainConfig, {**record}) and set(record) == set(KNOWN)


def test_several_files_and_a_part_of_them(run: Run, model: Path, tmp_path: Path) -> None:
    """Two files, the first rows of each, some of them held out: the run of one file that holds just those."""
    one, two = write_rows(tmp_path / "one.json", 6), write_rows(tmp_path / "two, b.json", 5, start=20)
    both = [*json.loads(one.read_text("utf-8"))[:4], *json.loads(two.read_text("utf-8"))[:4]]
    (tmp_path / "both.json").write_text(json.dumps(both, ensure_ascii=False), encoding="utf-8")
    two.rename(tmp_path / "two.json")
    base = ["train", "--model", model, "--max_steps", 2, "--device", "cpu", "--dtype", "float32", "--eval_rows", 3]
    names = f"{one}, {tmp_path / 'two.json'}"
    code, _, err = run(*base, "--data", names, "--max_samples", 4, "--output", tmp_path / "a")
    assert code == 0 and "one.json: its first 4 rows" in err and "held out: 3 of 8 rows" in err, err
    code, _, plain = run(*base, "--data", tmp_path / "both.json", "--output", tmp_path / "b")
    assert code == 0 and weights(tmp_path / "a") == weights(tmp_path / "b")
    totals = [
        re.findall(r" 8 rows \(alpaca\), [\d,]+ tokens, [\d,]+ learned, longest \d+", said) for said in (err, plain)
    ]
    assert len(totals[0]) == 1 and totals[0] == totals[1]
    # the record names the part, so that `evaluate` finds the same rows
    record = read_yaml(tmp_path / "a" / "run.yaml")
    assert (record["eval_fraction"], record["eval_rows"]) == (3 / 8, 0)
    # a comma in a name is no list where there is such a file; a file of a list that is missing is named
    two = write_rows(tmp_path / "two, b.json", 6)
    assert run(*base, "--data", two, "--output", tmp_path / "c")[0] == 0
    assert f"{tmp_path}/gone.json: no such file" in run(*base, "--data", f"{one},{tmp_path}/gone.json", "--output", tmp_path / "d")[2]  # fmt: skip
    err = run(*base[:-1], 6, "--data", one, "--output", tmp_path / "d")[2]
    assert "6 rows are too few to hold out 6" in err
    assert "give one of" in run(*base, "--eval_fraction", 0.1, "--data", one, "--output", tmp_path / "d")[2]
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("method", KNOWN["method"][1].__args__)
def test_run_yaml_repeats_the_run(run: Run, model: Path, tmp_path: Path, method: str) -> None:
    """Weights bit for bit and the same record, whatever was said by flags, by a file or by nobody."""
    first, again = tmp_path / "first", tmp_path / "again"
    data = write_rows(tmp_path / "rows.json", 9)
    more = ["--max_steps", 3, "--eval_rows", 2, "--seed", 7, "--lr_scheduler_type", "cosine", "--learning_rate", "3e-4"]
    code, _, err = run("train", "--model", model, "--data", data, "--output", first, "--method", method, "--device", "cpu", *more)  # fmt: skip
    assert code == 0, err
    code, _, err = run("train", "--config", first / "run.yaml", "--output", again)
    assert code == 0 and "minitune's words" not in err, err
    assert weights(first) == weights(again)
    one, other = ((f / "run.yaml").read_text(encoding="utf-8") for f in (first, again))
    assert one.replace(str(first), str(again)) == other
    # the record is not the run's own folder's any more: without another --output nothing is touched
    assert "holds another run" in run("train", "--config", first / "run.yaml")[2]
    assert weights(first) == weights(again)


def test_run_yaml_of_another_version(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read with a word of warning; a setting that this version lacks is named, with both versions."""
    summary = {"steps": 1, "seconds": 0.0, "loss": None, "eval_loss": None, "peak_memory_gib": 0.1}
    monkeypatch.setattr("minitune.train.run.train", lambda config, **_: summary)
    monkeypatch.setattr("minitune.train.checks.check_settings", lambda config: None)  # of files that are none
    config = build(TrainConfig, {"model": "m", "data": "d", "output": "o"})
    path = tmp_path / "run.yaml"
    text = to_yaml(config)
    assert text.startswith(f"# minitune {version()}\n") and version() == cli.__version__
    path.write_text(text, encoding="utf-8")
    assert run("train", "--config", path) == (0, run("train", "--config", path)[1], "")
    later = text.replace(version(), "99.0", 1)
    path.write_text(later, encoding="utf-8")
    code, _, err = run("train", "--config", path)
    assert code == 0 and err == f"{path}: written by minitune 99.0, this is {version()}: numbers may differ\n"
    path.write_text(later + "warp_speed: 9\n", encoding="utf-8")
    code, _, err = run("train", "--config", path)
    assert code == 2 and "warp_speed" in err and "written by minitune 99.0" in err and version() in err


def test_to_yaml_reads_back() -> None:
    """Every setting at a value of its own comes back as it was."""
    values: dict[str, Any] = {}
    for i, (name, (field, kind)) in enumerate(KNOWN.items()):
        options = getattr(kind, "__args__", ())
        if kind is bool:
            values[name] = not field.default
        elif options and isinstance(options[0], str):
            values[name] = options[-1]
        elif kind is str:
            values[name] = f"值: #{i}\n  - 'x' "
        elif kind is int:
            values[name] = i + 1
        elif isinstance(field.default, tuple):
            values[name] = ("a_proj", "b_proj")
        else:
            values[name] = (i + 1) / 7e5
    config = build(TrainConfig, values)
    import yaml

    assert yaml.safe_load(to_yaml(config))["template"]["bos"] is False
    from minitune.config import flatten

    assert build(TrainConfig, flatten(yaml.safe_load(to_yaml(config)))) == config


# The other commands


def test_chat_and_export_take_files(run: Run, model: Path, tmp_path: Path) -> None:
    """LLaMA-Factory's files for inference and merging, with flags on top."""
    data = write_rows(tmp_path / "rows.json", 6)
    out = tmp_path / "out"
    assert run("train", "--model", model, "--data", data, "--output", out, "--max_steps", 1, "--device", "cpu")[0] == 0
    infer = tmp_path / "infer.yaml"
    infer.write_text(
        f"model_name_or_path: {model}\nadapter_name_or_path: {out}\ntemplate: cpm\ninfer_backend: huggingface\n"
        "trust_remote_code: true\ndo_sample: false\nmax_new_tokens: 400\nrepetition_penalty: 1.0\nnum_beams: 1\n",
        encoding="utf-8",
    )
    code, said, err = run("chat", "--config", infer, "--prompt", "你是谁", "--max_new_tokens", 4, "--dtype", "float32")
    assert code == 0 and "do_sample false → temperature 0" in " ".join(err.split()) and "template" in err, err
    plain = run("chat", "--adapter", out, "--prompt", "你是谁", "--max_new_tokens", 4, "--temperature", 0, "--dtype", "float32")  # fmt: skip
    assert (said, plain[0]) == (plain[1], 0)
    merge = tmp_path / "merge.yaml"
    merge.write_text(
        f"model_name_or_path: {model}\nadapter_name_or_path: {out}\ntemplate: cpm\ntrust_remote_code: true\n"
        f"export_dir: {tmp_path / 'merged'}\nexport_size: 5\nexport_device: cpu\nexport_legacy_format: false\n",
        encoding="utf-8",
    )
    code, _, err = run("export", "--config", merge, "--format", "minicpm")
    assert code == 0 and "export_size" in err, err
    assert (
        run("export", "--model", model, "--adapter", out, "--output", tmp_path / "plain", "--format", "minicpm")[0] == 0
    )
    assert weights(tmp_path / "merged") == weights(tmp_path / "plain")
    shutil.rmtree(tmp_path / "merged")
    for command, more, words in (
        ("chat", ["--num_beams", 4], ("num_beams: 4 is not supported",)),
        ("chat", ["--temperature", "warm"], ("temperature is 'warm'", "a number")),
        ("chat", ["--top_k", 1.5], ("top_k is '1.5'", "a whole number")),
        ("chat", ["--adapters", "a", "b"], ("one adapter at a time",)),
        ("chat", ["--lora_r", 4], ("lora_r",)),
        ("export", ["--export_quantization_bit", 4], ("export_quantization_bit: 4 is not supported",)),
        ("export", ["--config", infer], ("do_sample",)),
    ):
        code, said, err = run(command, *more)
        assert code == 2 and said == "" and err.count("\n") == 1 and all(word in err for word in words), err
    assert not (tmp_path / "merged").exists()
    assert "write --config infer.yaml" in run("chat", "infer.yaml")[2]


def test_top_k_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling's flags are its fields: -1 and none are no limit, texts are parsed by their kinds."""
    seen: list[Any] = []
    monkeypatch.setattr("minitune.infer.chat.main", lambda **values: seen.append(values) or 0)
    flags = "--model m --top_k -1 --temperature 0.5 --seed 3 --max-new-tokens 9 --default_system"
    assert cli.main(["chat", *flags.split(), "你好"]) == 0
    sampling = seen[0].pop("sampling")
    assert (sampling.top_k, sampling.temperature, sampling.seed, sampling.max_new_tokens) == (0, 0.5, 3, 9)
    assert seen[0] == {"model": "m", "system": "你好"}


# The help page


@pytest.mark.parametrize("columns", [80, 110])
def test_help_at_two_widths(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each setting once, with its default, in groups; no other program's name; nothing wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    page = capsys.readouterr().out
    assert max(len(line) + sum(ord(c) > 0x2E80 for c in line) for line in page.splitlines()) <= columns
    for name in KNOWN:
        assert len(re.findall(rf"^  --{re.escape(name)}(?= |$)", page, re.M)) == 1, name
    flags = {flag for line in page.splitlines() for flag in re.findall(r"^  --([\w.]+)", line)}
    assert flags == {*KNOWN, "config"}
    assert not {"cutoff_len", "lora_rank", "stage"} & flags
    entries = re.split(r"\n(?=  --)", page.partition("start here:")[2])
    for entry in entries[1:]:
        if not entry.startswith("  --config"):
            assert re.search(r"\[[^\]]+\]\s*$", entry.split("\n\n")[0]), entry
    heads = re.findall(r"^(\w[\w ]*):$", page, re.M)
    assert heads[:3] == ["options", "start here", "data"]
    first = page.partition("start here:")[2].partition("\n\n")[0]
    assert len(re.findall(r"^  --", first, re.M)) <= 10 and "--learning_rate" in first


def test_every_foreign_name_is_a_flag() -> None:
    """What a file may say, the command line may say too."""
    parser = cli.Parser(prog="minitune train", allow_abbrev=False)
    cli.COMMANDS["train"][1](parser)
    names = {o.lstrip("-") for o in parser._option_string_actions}
    assert {*tables.TRAIN} <= names
    words = [f"--{name}" for name in itertools.islice(tables.TRAIN, 40)]
    assert len(vars(parser.parse_args(words))) == 40

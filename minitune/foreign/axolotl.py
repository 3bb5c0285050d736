"""axolotl's names: the keys of its YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.foreign.llama_factory import val_size
from minitune.foreign.rules import Refused, Rule, Wrong, no_effect, only, plain, shown

if TYPE_CHECKING:
    from minitune.foreign.reading import Context, Item

NO = (False,)
NAME = "axolotl"
MARKS = ("micro_batch_size", "sequence_len", "datasets")
NO_EFFECT = no_effect(
    {
        "rows are tokenised once and held ready": "dataset_prepared_path dataset_processes dataset_keep_in_memory "
        "skip_prepare_dataset shuffle_merged_datasets shuffle_before_merging_datasets preprocess_iterable",
        "rows are packed, nothing is padded, and none sees another": "eval_sample_packing pad_to_sequence_len "
        "sample_packing_group_size sample_packing_bin_size sample_packing_sequentially batch_flattening "
        "multipack_real_batches sample_packing_eff_est curriculum_sampling",
        "what is computed how is chosen by the hardware": "flash_attention sdp_attention xformers_attention "
        "flex_attention sage_attention eager_attention flash_attn_cross_entropy lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel lora_embedding_kernel chunked_cross_entropy cut_cross_entropy low_cpu_mem_usage gc_steps "
        "gc_collect_steps layer_offloading lora_on_cpu qlora_sharded_model_loading",
        "read from the checkpoint": "model_type tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_config "
        "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model is_falcon_derived_model "
        "base_model_config resize_token_embeddings_to_32x",
        "a loss that is not finite stops the run": "loss_watchdog_threshold loss_watchdog_patience",
        "held-out loss is computed in packs": "eval_batch_size eval_sequence_len",
        "goes with a switch that is off": "merge_lora merge_method loftq_bits bnb_config_kwargs",
        "checked anyway": "strict save_first_step",
    }
)
FAMILIES = dict.fromkeys(("liger_",), "what is computed how is chosen by the hardware")
FAMILIES |= dict.fromkeys(("mlflow_", "comet_", "wandb_", "swanlab_"), "log.jsonl and loss.png hold every step")
FAMILIES |= dict.fromkeys(("relora_", "trl.", "vllm.", "generation_"), "goes with a switch that is off")
ONLY = only(
    ((), "minitune learns the answers of conversations; leave it out", "rl pretraining_dataset reward_model"),
    (NO, "only answers are learned: write train_on_inputs: false", "train_on_inputs"),
    (
        (),
        "an adapter is not trained further: merge it with `minitune export`, and train on the result",
        "lora_model_dir",
    ),
    (NO, "adapters here are plain LoRA on linears; leave it out", "peft_use_dora relora lora_fan_in_fan_out"),
    ((), "adapters here are plain LoRA on linears; leave it out", "peft_layers_to_transform lora_target_parameters"),
    (
        (),
        "leave it out",
        "plugins tokens eot_tokens unfrozen_parameters lr_groups embedding_lr max_memory gpu_memory_limit",
    ),
    ((), "write lr_scheduler: linear, cosine or constant, without more", "cosine_min_lr_ratio lr_quadratic_warmup"),
    ((), "write it into the rows as `system`", "default_system_message"),
    (NO, "`minitune data check` lists repeated rows; leave it out", "dataset_exact_deduplication"),
    ((), "write chat_template: tokenizer_default", "chat_template_jinja"),
)


def datasets(target: str) -> Rule:
    """`datasets: [{path: …, type: …}]`: local files in a form that we read."""

    def rule(item: Item, context: Context) -> dict[str, Any] | None:
        given = item.value if isinstance(item.value, list) else [item.value]
        return {target: ",".join(path for entry in given if plain(entry) is not None for path in files(entry, context))}

    return rule


def files(entry: Any, context: Context) -> list[str]:
    """The files that one entry names."""
    if not isinstance(entry, dict):
        return [str(entry)]
    rest = {k: v for k, v in entry.items() if plain(v) is not None}
    path, kind, inside = rest.pop("path", None), str(rest.pop("type", "")), rest.pop("data_files", None)
    rest.pop("ds_type", None)
    if rest.pop("split", "train") != "train":
        raise Refused(f"{path}: write the file of that split as path")
    if kind.partition(":")[0] not in ("", "alpaca", "chat_template", "sharegpt", "alpaca_chat.load_qa"):
        raise Refused(f"{path}: type {shown(kind)}: write the rows as instruction and output, or messages")
    for name in ("field_messages", "message_property_mappings", "message_field_role", "message_field_content"):
        rest.pop(name, None) if fits(name, rest.get(name)) else None
    if rest:
        raise Refused(f"{path}: {', '.join(rest)}: name the keys in the file as its form does, and leave it out")
    paths = [str(p) for p in (inside if isinstance(inside, list) else [inside or path])]
    missing = next((p for p in paths if not Path(p).is_file()), None)
    if missing:
        raise Wrong(f"{missing} is no file here: download the data, and write the file as path")
    if kind.startswith("alpaca"):
        context.remark(f"{paths[0]}: in the model's own chat template, not alpaca's `### Instruction:` text")
    return paths


def fits(name: str, value: Any) -> bool:
    """Whether a key's name is one that our forms have."""
    if name == "message_property_mappings":
        return value in ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})
    return value in {
        "field_messages": ("messages", "conversations"),
        "message_field_role": ("role", "from"),
        "message_field_content": ("content", "value"),
    }.get(name, ())


def adapter(item: Item, context: Context) -> dict[str, Any]:
    kind = plain(item.value)
    if kind not in (None, "lora", "qlora"):
        raise Refused("write adapter: lora, or leave it empty for every parameter")
    return {"method": "full" if kind is None else kind}


def target_linear(item: Item, context: Context) -> dict[str, Any]:
    return {"lora_target_modules": "all-linear"} if plain(item.value) else {}


def checkpointing(item: Item, context: Context) -> dict[str, Any]:
    """axolotl's and unsloth's words for where recomputed activations start."""
    value = plain(item.value)
    if value in ("offload", "offload_disk", "unsloth"):
        return {"gradient_checkpointing": "true"}
    return {} if value is None else {"gradient_checkpointing": item.value}


def excess(item: Item, context: Context) -> dict[str, Any]:
    word = str(item.value)
    return {"overlong": {"truncate": "cut", "raise": "error"}.get(word, word)}


def chat_template(item: Item, context: Context) -> dict[str, Any]:
    name = plain(item.value)
    if name not in (None, "tokenizer_default", "chatml", "llama3"):
        raise Refused("write chat_template: tokenizer_default, the checkpoint's own")
    return {"template.name": "auto" if name is None else "model"}


def special_tokens(item: Item, context: Context) -> dict[str, Any] | None:
    if plain(item.value) is not None and item.spelling.rpartition(".")[2] != "pad_token":
        raise Refused("the tokenizer's own special tokens are trained; leave it out")
    context.moot(item, "nothing is padded")
    return None


def per_epoch(name: str) -> Rule:
    def rule(item: Item, context: Context) -> dict[str, Any]:
        return {name: 0}

    return rule


def batch_size(item: Item, context: Context) -> dict[str, Any]:
    if context.program == NAME:
        raise Refused("write micro_batch_size and gradient_accumulation_steps")
    return {"per_device_train_batch_size": item.value}


def wandb(item: Item, context: Context) -> dict[str, Any]:
    if plain(item.value) is None:
        return {}
    if "track" in context.known:
        return {"track": "wandb"}
    raise Refused("log.jsonl and loss.png hold every step; leave it empty")


BECOMES: dict[str, Rule] = {
    "val_set_size": val_size,
    "datasets": datasets("data"),
    "test_datasets": datasets("eval_data"),
    "adapter": adapter,
    "lora_target_linear": target_linear,
    "gradient_checkpointing": checkpointing,
    "activation_checkpointing": checkpointing,
    "excess_length_strategy": excess,
    "chat_template": chat_template,
    "special_tokens": special_tokens,
    "evals_per_epoch": per_epoch("eval_steps"),
    "saves_per_epoch": per_epoch("save_steps"),
    "batch_size": batch_size,
    "wandb_project": wandb,
}


def defaults(context: Context) -> dict[str, Any]:
    """What axolotl takes where its file says nothing, as far as it changes what is computed."""
    warm = {} if context.values.get("warmup_steps") else {"warmup_ratio": 0.03}
    return {
        "method": "full",
        "lora_dropout": 0.0,
        "max_length": 512,
        "overlong": "drop",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "template.join": "\n",
        **warm,
    }

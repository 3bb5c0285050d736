"""LLaMA-Factory's names: its files for training (sft), for inference and for merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minitune.foreign import dataset_info
from minitune.foreign.rules import Refused, Rule, Wrong, no_effect, only, plain, words

if TYPE_CHECKING:
    from minitune.foreign.reading import Context, Item

NO = (False,)
NAME = "LLaMA-Factory"
MARKS = ("stage", "finetuning_type")  # every published file for training has them
NO_EFFECT = no_effect(
    {
        "rows are tokenised once and held ready": "preprocessing_num_workers preprocessing_batch_size overwrite_cache "
        "buffer_size data_shared_file_system media_dir",
        "log.jsonl and loss.png hold every step": "plot_loss include_effective_tokens_per_second compute_accuracy "
        "print_param_status",
        "what is computed how is chosen by the hardware": "flash_attn use_unsloth use_unsloth_gc enable_liger_kernel "
        "use_v1_kernels use_reentrant_gc upcast_layernorm upcast_lmhead_output low_cpu_mem_usage offload_folder "
        "use_kv_cache quantization_device_map double_quantization",
        "the tokenizer's own files decide": "use_fast_tokenizer",
        "what a person wrote is always text": "split_special_tokens",
        "the hub's own client holds your login": "hf_hub_token ms_hub_token om_hub_token",
        "chat's": "infer_backend infer_dtype",
        "goes with a switch that is off": "loraplus_lr_embedding pissa_iter pissa_convert init_special_tokens "
        "asft_alpha eaft_alpha moe_aux_loss_coef create_new_adapter eval_num_beams use_ray",
        "conversations are trained as they are written": "enable_thinking preserve_thinking",
    }
)
FAMILIES = {
    **dict.fromkeys(
        ("galore_", "apollo_", "badam_", "fp8", "kt_", "ray_", "hyper_", "megatron_"), "goes with a switch that is off"
    ),
    **dict.fromkeys(("pref_", "dpo_", "kto_", "ppo_", "simpo_", "ref_model", "reward_model", "ld_alpha"), "not of sft"),
    **dict.fromkeys(("freeze_trainable", "freeze_extra", "oft_", "module_dropout"), "of another finetuning_type"),
    **dict.fromkeys(("image_", "video_", "audio_", "freeze_"), "text is all that is learned"),
    **dict.fromkeys(("swanlab_", "wandb_"), "goes with report_to"),
    **dict.fromkeys(("vllm_", "sglang_"), "another program's engine"),
    "export_": "of merging",
    **dict.fromkeys(("profiler_", "profile_"), "goes with a switch that is off"),
}
ONLY = only(
    (("sft",), "minitune learns the answers of conversations: write stage: sft", "stage"),
    (
        NO,
        "not one of minitune's methods (lora, full); leave it out",
        "use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro use_mca use_megatron_bridge "
        "use_hyper_parallel use_dft_loss use_asft_loss use_eaft_loss use_kt pissa_init shift_attn mixture_of_depths "
        "train_from_scratch fp8 use_dora",
    ),
    ((), "A and B learn at one rate; leave it out", "loraplus_lr_ratio"),
    (NO, "--method full trains every module; leave it out", "additional_target"),
    (NO, "the vocabulary stays as it is; leave it out", "resize_vocab add_tokens add_special_tokens"),
    ((), "the vocabulary stays as it is; leave it out", "new_special_tokens_config"),
    ((), "the checkpoint's config.json says it; leave it out", "rope_scaling"),
    (NO, "only answers are learned; leave it out", "train_on_prompt"),
    (NO, 'write "weight": 0 on the answers that are not to be learned', "mask_history"),
    (NO, "rows are read from files; leave it out", "streaming"),
    (("concat",), "files are learned together: write mix_strategy: concat", "mix_strategy"),
    ((), "files are learned together; leave it out", "interleave_probs"),
    (NO, "one held-out loss is measured; leave it out", "eval_on_each_dataset"),
    ((True,), "padding does not exist here; leave it out", "ignore_pad_token_for_loss"),
    ((), "rows are tokenised from the text; leave it out", "tokenized_path"),
    ((), "tool calls are not learned; leave it out", "tool_format"),
    ((), "write it into the rows as `system`", "default_system"),
    (NO, "rows are shuffled each epoch; leave it out", "disable_shuffling"),
    (NO, "tensorboard by --track, where there is one; leave it out", "use_swanlab"),
    (("bnb", "bitsandbytes"), "write quantization_method: bnb", "quantization_method"),
    (
        (),
        "an adapter is not trained further: merge it with `minitune export`, and train on the result",
        "adapter_name_or_path adapter_folder",
    ),
    (
        (),
        "fetch it with `minitune download MODEL --cache_dir DIR` and write the folder it prints as model",
        "cache_dir",
    ),
    ((), "that is a file for merging: `minitune export --config FILE`", "export_dir"),
    (NO, "write enable_torch_profiler: false", "enable_torch_profiler"),
)
# Templates of families that minitune opens, and of the published examples: the checkpoint's own is what they render.
OWN_TEMPLATE: tuple[str, ...] = (
    "model",
    "empty",
    "cpm3",
    "cpm4",
    "chatml",
    "llama2",
    "llama2_zh",
    "llama3",
    "smollm",
    "smollm2",
)
OWN_TEMPLATE += ("granite3", "granite4", "yi", "deepseek", "mistral", "qwen", "qwen3", "qwen3_nothink", "qwen3_5")


def template(item: Item, context: Context) -> dict[str, Any]:
    name = str(item.value).strip()
    if name in ("minicpm", "cpm"):
        return {"template.name": "minicpm"}
    if plain(item.value) is None or name == "auto":
        return {"template.name": "auto"}
    if name in OWN_TEMPLATE:
        return {"template.name": "model"}
    raise Refused("write template: cpm (MiniCPM's), or leave it out for the checkpoint's own chat template")


def lora_target(item: Item, context: Context) -> dict[str, Any]:
    """`all` and `all-linear` are every linear; a list of names in any spelling."""
    value = plain(item.value)
    if value in ("all", "all-linear", "all_linear") or value in (["all"], ["all-linear"]):
        return {"lora_target_modules": "all-linear"}
    return {"lora_target_modules": item.value}


def val_size(item: Item, context: Context) -> dict[str, Any]:
    """Below one a part of the rows, from two on their number."""
    number = plain(item.value)
    if isinstance(number, str | list | bool) or (number is not None and (number == 1 or number < 0)):
        raise Wrong("write a part below 1, or a number of rows from 2 on")
    if number is None or number < 1:
        return {"eval_fraction": number or 0.0}
    return {"eval_rows": int(number)}


def datasets(name: str, target: str) -> Rule:
    """A name of dataset_info.json, or a file."""

    def rule(item: Item, context: Context) -> dict[str, Any] | None:
        value = plain(item.value)
        if value is None:
            return {}
        named = context.program == NAME or "dataset_dir" in context.items
        names = [str(v) for v in value] if isinstance(value, list) else words(value) if named else [str(value)]
        folder = str(context.raw("dataset_dir", "data"))
        files = dataset_info.files(names, folder, named, context.remark)
        return {target: ",".join(files)}

    return rule


def max_samples(item: Item, context: Context) -> dict[str, Any]:
    return {"max_samples": 0 if plain(item.value) is None else item.value}


def no_checkpointing(item: Item, context: Context) -> dict[str, Any]:
    return {"gradient_checkpointing": "false"} if plain(item.value) is True else {}


def early_stopping(item: Item, context: Context) -> dict[str, Any]:
    """Counted in held-out losses there too, whatever the name says."""
    return {"early_stopping_patience": plain(item.value) or 0}


def dataset_dir(item: Item, context: Context) -> None:
    """Read by `datasets`."""
    context.converted(item, f"the folder of {dataset_info.INFO}")


BECOMES: dict[str, Rule] = {
    "template": template,
    "lora_target": lora_target,
    "target_modules": lora_target,
    "lora_target_modules": lora_target,
    "val_size": val_size,
    "dataset": datasets("dataset", "data"),
    "eval_dataset": datasets("eval_dataset", "eval_data"),
    "dataset_dir": dataset_dir,
    "max_samples": max_samples,
    "max_train_samples": max_samples,
    "disable_gradient_checkpointing": no_checkpointing,
    "early_stopping_steps": early_stopping,
    "early_stop_interval": early_stopping,
}


def defaults(context: Context) -> dict[str, Any]:
    """What LLaMA-Factory takes where its file says nothing, as far as it changes what is computed."""
    return {
        "method": "lora",
        "lora_r": 8,
        "lora_alpha": 2.0 * context.value("lora_r"),
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "max_length": 2048,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "template.join": "\n",
    }

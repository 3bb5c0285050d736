"""The names of scripts and of the tutorial: transformers' TrainingArguments, PEFT's LoraConfig, TRL's SFTConfig and
ModelConfig, bitsandbytes' config. Most of them are ours too; here are those that differ or say nothing here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minitune.foreign.rules import Refused, Rule, no_effect, only, plain

if TYPE_CHECKING:
    from minitune.foreign.reading import Context, Item

NO = (False,)
NOT_LORA = "adapters here are plain LoRA on linears; leave it out"
NO_EFFECT = no_effect(
    {
        "rows are tokenised once and held ready": "dataloader_num_workers dataloader_pin_memory dataset_num_proc "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context "
        "dataloader_in_order remove_unused_columns length_column_name label_names include_for_metrics "
        "batch_eval_metrics dataset_kwargs shuffle_dataset",
        "rows are packed, nothing is padded, and none sees another": "group_by_length pad_to_multiple_of padding_free "
        "packing_strategy eval_packing padding_side pad_token",
        "the launcher starts the processes; a step's rows are dealt to them": "ddp_find_unused_parameters "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
        "ddp_backend ddp_timeout local_rank save_on_each_node log_on_each_node average_tokens_across_devices "
        "accelerator_config",
        "every parameter on several processes is sharded (FSDP2), the numbers are the same": "fsdp fsdp_config "
        "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
        "log.jsonl and loss.png hold every step": "logging_strategy logging_first_step logging_dir log_level "
        "log_level_replica logging_nan_inf_filter disable_tqdm include_num_input_tokens_seen run_name project "
        "include_tokens_per_second trackio_space_id trackio_bucket_id trackio_static_space_id",
        "the held-out loss is computed in packs": "per_device_eval_batch_size eval_accumulation_steps eval_delay "
        "prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object do_eval fp16_full_eval "
        "bf16_full_eval",
        "a checkpoint holds what --resume needs": "save_only_model save_safetensors enable_jit_checkpoint "
        "restore_callback_states_from_checkpoint",
        "a folder that holds a run is never overwritten": "overwrite_output_dir",
        "what is computed how is chosen by the hardware": "attn_implementation use_liger_kernel liger_kernel_config "
        "torch_compile torch_compile_backend torch_compile_mode tf32 use_cache torch_empty_cache_steps "
        "skip_memory_metrics gradient_checkpointing_kwargs activation_checkpointing_kwargs half_precision_backend "
        "fp16_opt_level fp16_backend jit_mode_eval activation_offloading auto_find_batch_size device_map debug",
        "the seed fixes order, adapter and dropout": "full_determinism",
        "no code of a checkpoint is run": "trust_remote_code",
        "the hub's own client holds your login": "hub_token use_auth_token token",
        "`minitune train` trains": "do_train",
        "nothing is pushed": "hub_private_repo hub_strategy hub_always_push hub_revision",
        "an adapter that is trained learns": "inference_mode",
        "goes with a switch that is off": "qalora_group_size megatron_core megatron_config runtime_config "
        "bnb_4bit_compute_dtype bnb_4bit_use_double_quant use_bnb_nested_quant bnb_4bit_quant_storage "
        "llm_int8_threshold quant_method",
        "of the adapter that is read": "peft_version auto_mapping",
    }
)
ONLY = only(
    (NO, "upload the finished folder with the hub's own client", "push_to_hub hub_model_id"),
    ((0,), "nothing is added to embeddings or labels here; leave it out", "neftune_noise_alpha label_smoothing_factor"),
    (NO, "--resume goes on at the very next row; leave it out", "ignore_data_skip"),
    (NO, "no row is left out at an epoch's end; leave it out", "dataloader_drop_last"),
    (NO, "answers come from `minitune chat`; leave it out", "do_predict predict_with_generate"),
    ((), "AdamW with adam_beta1, adam_beta2, adam_epsilon; leave it out", "optim_args optim_target_modules adafactor"),
    ((), "write lr_scheduler_type: linear, cosine or constant, without more", "lr_scheduler_kwargs"),
    ((), "a step's rows are dealt to the processes, nothing else; leave it out", "parallelism_config"),
    (NO, "write device: cuda or cpu", "use_mps_device"),
    (("random", "group_by_length"), "rows are shuffled each epoch", "train_sampling_strategy"),
    (("nll",), "the loss is cross-entropy over learned tokens; leave it out", "loss_type"),
    (("none", False), "biases stay as they are: write bias: none", "bias lora_bias"),
    (("CAUSAL_LM", "TaskType.CAUSAL_LM"), "write task_type: CAUSAL_LM", "task_type lora_task_type"),
    (("LORA", "PeftType.LORA"), "write peft_type: LORA", "peft_type"),
    (NO, "--method full trains every module; leave it out", "modules_to_save lora_modules_to_save"),
    ((True,), "A is drawn from the seed and B is zero; leave it out", "init_lora_weights"),
    (
        NO,
        NOT_LORA,
        "use_dora exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern loftq_config "
        "use_qalora trainable_token_indices layer_replication target_parameters eva_config corda_config lora_ga_config "
        "velora_config alora_invocation_tokens monteclora_config use_bdlora arrow_config kasa_config fan_in_fan_out "
        "ensure_weight_tying",
    ),
    (
        ("main", "master"),
        "fetch it with `minitune download MODEL --revision R` and write the folder as model",
        "revision model_revision",
    ),
    (("loss", "eval_loss"), "the held-out loss decides: write eval_loss", "metric_for_best_model"),
    (NO, "a lower loss is better: write false", "greater_is_better"),
    ((True,), "only answers are learned; leave it out", "completion_only_loss assistant_only_loss"),
    ((), "rows are conversations (instruction and output, messages, …); leave it out", "dataset_text_field"),
    ((), "write template: minicpm, or leave it out for the checkpoint's own", "chat_template_path"),
    ((), "the tokenizer's own end token closes an answer; leave it out", "eos_token"),
    (NO, "the base stays in 16 bits; leave it out", "load_in_8bit"),
    (("nf4",), "write nf4", "bnb_4bit_quant_type quantization_type"),
    ((), "leave it out", "model_init_kwargs dataset_config"),
)


def max_steps(item: Item, context: Context) -> dict[str, Any]:
    return {"max_steps": 0 if plain(item.value) in (None, -1) else item.value}


def warmup_steps(item: Item, context: Context) -> dict[str, Any]:
    """transformers 5 reads a number below one as a part of all steps, as many files mean it."""
    number = plain(item.value)
    return {"warmup_ratio" if isinstance(number, float) and 0 < number < 1 else "warmup_steps": item.value}


def whole_steps(name: str) -> Rule:
    """transformers reads a number below one as a part of all steps; here it is a number of steps."""

    def rule(item: Item, context: Context) -> dict[str, Any]:
        number = plain(item.value)
        if isinstance(number, float) and 0 < number < 1:
            raise Refused(f"write {name} as a number of steps")
        return {name: item.value}

    return rule


def scheduler(item: Item, context: Context) -> dict[str, Any]:
    name = last_word(item.value)
    if name not in ("linear", "cosine", "constant", "constant_with_warmup"):
        raise Refused("write lr_scheduler_type: linear, cosine or constant")
    return {"lr_scheduler_type": name.removesuffix("_with_warmup")}


def last_word(value: Any) -> str:
    """`SchedulerType.COSINE`, `torch.bfloat16` -> cosine, bfloat16"""
    return str(value).strip().lower().rpartition(".")[2]


def precision(name: str) -> Rule:
    """`bf16: true` and its kin."""

    def rule(item: Item, context: Context) -> dict[str, Any] | None:
        flag = plain(item.value)
        if flag is True:
            return {"dtype": name}
        if flag not in (None, False, "auto"):
            raise Refused("write true or false")
        context.moot(item, "dtype says what is computed in, auto by itself")
        return None

    return rule


def dtype(item: Item, context: Context) -> dict[str, Any]:
    name = last_word(item.value)
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
    return {"dtype": short.get(name, name)}


def truncation(item: Item, context: Context) -> dict[str, Any]:
    if item.value != "keep_start":
        raise Refused("a row that is too long loses its tail: write truncation_mode: keep_start")
    return {"overlong": "cut"}


def use_peft(item: Item, context: Context) -> dict[str, Any]:
    return {"method": "lora" if plain(item.value) else "full"}


def use_cpu(item: Item, context: Context) -> dict[str, Any]:
    return {"device": "cpu"} if plain(item.value) else {}


def data_seed(item: Item, context: Context) -> dict[str, Any]:
    if plain(item.value) not in (None, context.raw("seed", 42)):
        raise Refused("one seed orders the rows and draws the rest: write seed alone")
    return {}


def report_to(item: Item, context: Context) -> dict[str, Any]:
    value = plain(item.value)
    names = value if isinstance(value, list) else [] if value is None else str(value).split(",")
    names = [str(n).strip() for n in names if str(n).strip() != "none"]
    if names and "track" not in context.known:
        raise Refused("log.jsonl and loss.png hold every step: write report_to: none")
    return {"track": names} if names else {}


def optimizer(context: Context) -> None:
    """AdamW in 32 or 8 bits. An adapter's moments are small, so those of 32 stand in for 8."""
    full, eight = context.value("method") == "full", ("adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit")
    for item in (context.items[n] for n in ("optim", "optimizer") if n in context.items):
        name = last_word(item.value)
        if name in (*eight, "adamw_8bit", "paged_adamw_32bit", "paged_adamw") and not (full and "8bit" in name):
            context.moot(item, "AdamW keeps 32 bits, on the card")
        elif context.option("optim", name):
            context.set("optim", name, item)
        elif name in eight:
            context.set("optim", "adamw_8bit", item)
            context.converted(item, "optim adamw_8bit")
        elif name in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "none"):
            if full and name != "none":
                context.set("optim", "adamw", item)
            context.same(item)
        else:
            raise Refused(f"the optimizer is AdamW: write {item.spelling}: adamw_torch", item)


def schedule(context: Context) -> None:
    """transformers' `constant` knows no warm-up; ours does, since its `constant_with_warmup` is spelled so here."""
    item = context.items.get("lr_scheduler_type") or context.items.get("lr_scheduler")
    if context.program and item and last_word(item.value) == "constant":
        for name in ("warmup_steps", "warmup_ratio"):
            if context.values.get(name):
                context.values[name] = 0
                context.converted(context.given[name], f"{name} 0, since constant has no warm-up there")


def later(item: Item, context: Context) -> None:
    """Decided when all is read: by one of `FINISH`."""


def strategies(context: Context) -> None:
    """`eval_strategy` and `save_strategy`: no, steps or epoch, beside their numbers of steps."""
    for what, names in (("eval", ("eval_strategy", "evaluation_strategy")), ("save", ("save_strategy",))):
        item = next((context.items[n] for n in names if n in context.items), None)
        name = f"{what}_steps"
        if item is None or context.decided(name, item):
            continue
        word = str(item.value).lower().rpartition(".")[2]
        if word == "steps":
            if name not in context.given:  # as transformers has it
                every = context.values.get("logging_steps", 500) if what == "eval" else 500
                context.set(name, every, item)
            context.converted(item, f"{name} {context.value(name)}")
        elif word in ("epoch", "no", "none", "false"):
            context.values[name] = 0
            context.given[name] = item
            context.converted(item, f"{name} 0: at each epoch's end")
        else:
            raise Refused("write no, steps or epoch", item)


def packing(context: Context) -> None:
    """A packed batch there has `max_length` tokens a row: a step's size in tokens. Rows are always packed here."""
    names = ("packing", "sample_packing", "neat_packing")
    given = [context.items[n] for n in names if n in context.items]
    item = next((i for i in given if plain(i.value) is True), None)
    for other in given:
        if other is not item:
            context.moot(other, "rows are always packed, and none sees another")
    if item is None or context.value("tokens_per_step"):
        return
    rows = context.value("per_device_train_batch_size") * context.value("gradient_accumulation_steps")
    tokens = rows * context.value("max_length")
    context.set("tokens_per_step", tokens, item)
    context.converted(item, f"tokens_per_step {tokens} ({rows} packs of {context.value('max_length')})")


def quantised(context: Context) -> None:
    """`quantization_bit: 4` and its kin: LoRA over a 4-bit base."""
    for name in ("quantization_bit", "load_in_4bit", "quant_bits"):
        item = context.items.get(name)
        bits = plain(item.value) if item else None
        if item is None:
            continue
        if bits in (None, False, 0):
            context.same(item)
            continue
        if bits not in (4, True):
            raise Refused("a quantised base has 4 bits: write 4, or leave it out", item)
        if context.value("method") == "full":
            raise Refused("every parameter can't learn in 4 bits: write method: lora, or leave it out", item)
        context.values["method"] = "qlora"
        context.converted(item, "method qlora")


BECOMES: dict[str, Rule] = {
    "max_steps": max_steps,
    "warmup_steps": warmup_steps,
    "logging_steps": whole_steps("logging_steps"),
    "save_steps": whole_steps("save_steps"),
    "eval_steps": whole_steps("eval_steps"),
    "lr_scheduler_type": scheduler,
    "lr_scheduler": scheduler,
    "optim": later,
    "optimizer": later,
    "eval_strategy": later,
    "evaluation_strategy": later,
    "save_strategy": later,
    "packing": later,
    "sample_packing": later,
    "neat_packing": later,
    "quantization_bit": later,
    "load_in_4bit": later,
    "quant_bits": later,
    "bf16": precision("bfloat16"),
    "fp16": precision("float16"),
    "pure_bf16": precision("bfloat16"),
    "dtype": dtype,
    "torch_dtype": dtype,
    "model_init_kwargs.torch_dtype": dtype,
    "model_init_kwargs.dtype": dtype,
    "truncation_mode": truncation,
    "use_peft": use_peft,
    "use_lora": use_peft,
    "use_cpu": use_cpu,
    "no_cuda": use_cpu,
    "data_seed": data_seed,
    "report_to": report_to,
}
FINISH = (strategies, packing, quantised, optimizer, schedule)

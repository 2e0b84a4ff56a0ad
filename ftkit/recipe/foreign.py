"""What other tools' names mean here, and the keys of later versions of ftkit: one table.

It covers Hugging Face's TrainingArguments, TRL, peft, axolotl, LLaMA-Factory and AdapterHub's bottleneck adapters. A
name that means the same is an `Alias`; it may stand in its section or at the top level, like every key of ours.
Anything else is a `Refusal` that says what to do instead. The table is plain data; `recipe/names.py` applies it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftkit.recipe.foreign_values import as_share, choices, lower, module_names, quantization_of_bits, same


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name for one of our keys."""

    key: str
    """The dotted key; for names inside a data set, relative to the data set."""
    convert: Callable[[Any], Any] = same
    """The value in our terms. Values it does not know pass, for validation to refuse."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A name that works otherwise here, or not at all."""

    what: str
    how: str
    harmless: bool = False
    """What it asks for happens here anyway, or changes speed alone: a translated configuration loses nothing."""


_PROMPT_TOO = choices({True: "all", False: "assistant"})
_ANSWER_ONLY = choices({True: "assistant"})
_INSERTION = choices({True: "parallel", False: "sequential"})

# ------------------------------------------------------------------------------------------------ reasons for refusals


def _later(how: str) -> Refusal:
    return Refusal("not in this version", how)


def _use(how: str, why: str = "another tool's key", harmless: bool = False) -> Refusal:
    return Refusal(why, how, harmless)


_BATCH = Refusal(
    "the batch is global here", "set training.global_batch_size = per device × accumulation steps × devices"
)
_EVAL_BATCH = Refusal(
    "evaluation uses the same token budget as training", "set training.max_tokens_per_device", harmless=True
)
_PRECISION = _use("set model.dtype: bfloat16 or float32 (trained weights are kept in float32)")
_NO_NETWORK = Refusal("a prefix trains as it is, not through a network that makes it (P-Tuning v2)", "remove it")
_PROMPT_INIT = {"SAMPLE_VOCAB": "vocabulary", "TEXT": "vocabulary", "RANDOM": "random"}
"""peft's words; the text itself is `init_text`."""
_DATASETS = _use("list the data sets under data.train, and validation sets under data.eval, each with its path")
_QUANTIZATION = _use("set model.quantization: nf4 (blocks of 64, scales quantized too) or int8")
_PARALLEL = _use("set training.parallel: ddp or fsdp, and say where to run with --launch-config")
_LAUNCH = Refusal(
    "ftkit sets up its processes itself",
    "remove it; --num-processes and --launch-config say where to run",
    harmless=True,
)
_LOADER = Refusal(
    "the whole run is planned before its first step, there is no data loader to set", "remove it", harmless=True
)
_LENGTHS = Refusal("batches are balanced by tokens already", "remove it", harmless=True)
_EVALUATIONS = _use("set training.eval_steps: steps, or below 1 a share of the run; data.val_size: 0 turns it off")
_SAVES = _use("set training.save_steps: steps, or below 1 a share of the run")
_LOGGING = _use("set training.logging_steps; every value is in the run's metrics.jsonl", harmless=True)
_TRACKER_FLAGS = _use("name it in training.report_to, e.g. [tensorboard, wandb]")
_TRACKER_PLACE = _use("set training.report_to; trackers keep their files in the run's directory")
_TRACKER_SETTINGS = Refusal("a tracker's own settings stay outside of the recipe", "set its environment variables")
_TRACKER_RUNS = Refusal("a run that goes on stays the same one in its tracker", "remove it")
_HUB = _later("upload the directory that `ftkit export` writes, with the hub's own client")
_HUB_TOKEN = Refusal("a recipe holds no secrets", "set the environment variable HF_TOKEN")
_VERBS = _use("choose the verb on the command line: ftkit train, ftkit eval")
_RESUME = _use("go on with `ftkit train RECIPE --resume`, or name a checkpoint with --from")
_OVERWRITE = _use("give --overwrite on the command line; the old run is moved aside")
_REMOTE_CODE = Refusal("a recipe cannot switch on remote code", "give --trust-remote-code on the command line")
_DETERMINISTIC = _later("leave it out; on CPU, a run with the same seed repeats bit for bit")
_SEED = _use("set seed: it decides every random choice")
_ATTENTION = _use("set model.attn_implementation: auto, ftkit, eager, sdpa or flash_attention_2", harmless=True)
_SHIFTED_ATTENTION = Refusal("attention is exact here", "remove it")
_KERNELS = Refusal("ftkit's own loss never holds all logits", "remove it", harmless=True)
_WATCHDOG = Refusal("a run stops before a step that is not finite", "remove it", harmless=True)
_TEMPLATE = _use("leave it out to use the tokenizer's own template, or set model.chat_template")
_VOCABULARY = _use("name new tokens in model.add_tokens, control tokens in model.add_special_tokens")
_PADDING_TOKEN = Refusal("no padding token is needed", "remove it", harmless=True)
_TOKENIZER = _use("set model.tokenizer to a directory or hub id")
_TRAINER_ONLY = Refusal("has no counterpart in ftkit's training loop", "remove it")
_LORA_VARIANT = _later("leave it out; plain LoRA with a tuned learning_rate comes within a percent or two")
_SAVED_MODULES = _later("name the whole module in method.modules_to_save")
_PLACEMENT = _use("set method.placement: [attention, feed_forward], or one of them")
_ADAPTER_NORMS = Refusal(
    "bottleneck adapters come before the residual sum and before a norm that follows it", "remove it"
)
_ADAPTER_VARIANT = _later("leave it out; method.insertion, scale and dropout can be chosen")
_MODEL_LOADING = Refusal("the base model is loaded with its own settings", "remove it", harmless=True)
_SUPERVISED = Refusal("ftkit does supervised fine-tuning", "remove it; preference tuning is not in this version")
_CHECKPOINTING = _use("set training.gradient_checkpointing: true or false", harmless=True)
_PADDING = Refusal(
    "there is no padding to set: rows are packed, or padded to the longest of their batch", "remove it", harmless=True
)
_PREPARATION = Refusal(
    "prepared data is kept in ~/.cache/ftkit, and found again by its content", "remove it", harmless=True
)
_DROPPED_ROWS = _use("set data.train.N.max_samples")
_MESSAGE_KEYS = _use("name the turns' keys role and content, or from and value; map role names with roles")
_MIXING = _use("set data.mixing.strategy: weights, and a weight for each data set")


def _group(refusal: Refusal, names: str) -> dict[str, Alias | Refusal]:
    return dict.fromkeys(names.split(), refusal)


# ------------------------------------------------------------------------------------------------ the table

FOREIGN: dict[str, Alias | Refusal] = {
    # -- the same under another name
    "model_name_or_path": Alias("base_model"),
    "base_model_name_or_path": Alias("base_model"),
    "pretrained_model_name_or_path": Alias("base_model"),
    "model_name": Alias("base_model"),
    "model_id": Alias("base_model"),
    "model.name_or_path": Alias("base_model"),
    "model.model_name_or_path": Alias("base_model"),
    "model.base_model": Alias("base_model"),
    "model.name": Alias("base_model"),
    "model.path": Alias("base_model"),
    "model_revision": Alias("model.revision"),
    "revision_of_model": Alias("model.revision"),
    "torch_dtype": Alias("model.dtype"),
    "chat_template_path": Alias("model.chat_template"),
    "sequence_len": Alias("data.max_length"),
    "cutoff_len": Alias("data.max_length"),
    "max_seq_length": Alias("data.max_length"),
    "max_seq_len": Alias("data.max_length"),
    "model_max_length": Alias("data.max_length"),
    "val_set_size": Alias("data.val_size"),
    "sample_packing": Alias("data.packing"),
    "neat_packing": Alias("data.packing"),
    "train_on_inputs": Alias("data.train_on", _PROMPT_TOO),
    "train_on_prompt": Alias("data.train_on", _PROMPT_TOO),
    "mask_history": Alias("data.train_on", choices({True: "last_assistant", False: "assistant"})),
    "assistant_only_loss": Alias("data.train_on", _ANSWER_ONLY),
    "completion_only_loss": Alias("data.train_on", _ANSWER_ONLY),
    "enable_thinking": Alias("data.chat_template_kwargs.enable_thinking"),
    "finetuning_type": Alias("method.type"),
    "adapter_name_or_path": Alias("method.init_from"),
    "lora_model_dir": Alias("method.init_from"),
    "peft_type": Alias("method.type", lower),
    "adapter": Alias("method.type", choices({None: "full"})),
    "r": Alias("method.rank"),
    "lora_r": Alias("method.rank"),
    "lora_rank": Alias("method.rank"),
    "lora_alpha": Alias("method.alpha"),
    "lora_dropout": Alias("method.dropout"),
    "target_modules": Alias("method.targets", module_names),
    "lora_target_modules": Alias("method.targets", module_names),
    "lora_target": Alias("method.targets", module_names),
    "lora_target_linear": Alias("method.targets", choices({True: "all-linear"})),
    "exclude_modules": Alias("method.exclude"),
    "use_rslora": Alias("method.rank_stabilized"),
    "peft_use_rslora": Alias("method.rank_stabilized"),
    "init_lora_weights": Alias("method.init", choices({True: "kaiming"})),
    "peft_init_lora_weights": Alias("method.init", choices({True: "kaiming"})),
    "use_dora": Alias("method.dora"),
    "peft_use_dora": Alias("method.dora"),
    "loraplus_lr_ratio": Alias("method.learning_rate_ratio"),
    "pissa_init": Alias("method.init", choices({True: "pissa", False: "kaiming"})),
    "additional_target": Alias("method.modules_to_save", module_names),
    "lora_modules_to_save": Alias("method.modules_to_save"),
    "bottleneck_size": Alias("method.bottleneck"),
    "adapter_len": Alias("method.num_virtual_tokens"),
    "pre_seq_len": Alias("method.num_virtual_tokens"),
    "num_soft_prompt_tokens": Alias("method.num_virtual_tokens"),
    **_group(_NO_NETWORK, "prefix_projection encoder_hidden_size prompt_encoder_hidden_size"),
    "adapter_layers": Alias("method.num_layers"),
    "prompt_tuning_init": Alias("method.init", choices(_PROMPT_INIT)),
    "prompt_tuning_init_text": Alias("method.init_text"),
    "adapter_size": Alias("method.bottleneck"),
    "adapter_dropout": Alias("method.dropout"),
    "method.parallel": Alias("method.insertion", _INSERTION),
    "is_parallel": Alias("method.insertion", _INSERTION),
    "use_parallel_adapter": Alias("method.insertion", _INSERTION),
    "scaling": Alias("method.scale"),
    "num_epochs": Alias("training.num_train_epochs"),
    "epochs": Alias("training.num_train_epochs"),
    "lr": Alias("training.learning_rate"),
    "lr_scheduler": Alias("training.lr_scheduler_type"),
    "cosine_min_lr_ratio": Alias("training.min_lr_ratio"),
    "warmup_ratio": Alias("training.warmup_steps", as_share),
    "optimizer": Alias("training.optim"),
    **dict.fromkeys(("wandb_project", "mlflow_experiment_name", "swanlab_project"), Alias("training.project")),
    **dict.fromkeys(("wandb_name", "mlflow_run_name", "swanlab_run_name"), Alias("training.run_name")),
    "gradient_clipping": Alias("training.max_grad_norm"),
    "activation_checkpointing": Alias("training.gradient_checkpointing"),
    "load_best_model_at_end": Alias("training.final", choices({True: "best", False: "last"})),
    "effective_batch_size": Alias("training.global_batch_size"),
    "total_batch_size": Alias("training.global_batch_size"),
    "tokens": Alias("model.add_tokens"),
    "load_in_4bit": Alias("model.quantization", choices({True: "nf4", False: None})),
    "load_in_8bit": Alias("model.quantization", choices({True: "int8", False: None})),
    "quantization_bit": Alias("model.quantization", quantization_of_bits),
    # -- the same, inside a data set
    "data.train.*.file_name": Alias("path"),
    "data.train.*.hf_hub_url": Alias("path"),
    "data.train.*.formatting": Alias("format"),
    "data.train.*.type": Alias("format"),
    "data.train.*.num_samples": Alias("max_samples"),
    "data.train.*.config_name": Alias("subset"),
    "data.train.*.field_messages": Alias("columns.messages"),
    "data.train.*.field_instruction": Alias("columns.instruction"),
    "data.train.*.field_input": Alias("columns.input"),
    "data.train.*.field_output": Alias("columns.output"),
    "data.train.*.field_system": Alias("columns.system"),
    "data.train.*.field_tools": Alias("columns.tools"),
    "data.train.*.field": Alias("columns.text"),
    "data.train.*.text_column": Alias("columns.text"),
    # -- otherwise here, inside a data set
    "data.train.*.data_files": _use("write the file, a glob or the directory in path"),
    "data.train.*.ds_type": _use("remove it; the file's ending tells"),
    "data.train.*.chat_template": _use("set model.chat_template, one for the whole run"),
    "data.train.*.trust_remote_code": Refusal("data sets run no code", "remove it"),
    "data.train.*.train_on_eos": Refusal("the end of every trained turn is a target", "remove it"),
    "data.train.*.roles_to_train": _use("set data.train_on: assistant, last_assistant or all"),
    **_group(_MESSAGE_KEYS, "data.train.*.message_field_role data.train.*.message_field_content"),
    **_group(_MESSAGE_KEYS, "data.train.*.message_property_mappings data.train.*.tags"),
    **_group(_DROPPED_ROWS, "data.train.*.shards data.train.*.shards_idx data.train.*.sample_count"),
    **_group(_MIXING, "data.train.*.fraction data.train.*.mixture_proportion data.train.*.probability"),
    **_group(
        _use("for alpaca name columns.instruction, columns.input and columns.output"),
        "data.train.*.columns.query data.train.*.columns.response data.train.*.columns.history",
    ),
    # -- later versions of ftkit
    "master_dtype": _later("leave it out; trained weights are float32"),
    "torch_compile": _later("leave it out"),
    "on_nonfinite": _later("leave it out; a run stops before a step that is not finite"),
    # -- refused for now
    "rope_scaling": _later("leave it out, or use a base model with a longer context"),
    "label_smoothing_factor": _later("leave it out"),
    **_group(_later("leave it out"), "neftune_noise_alpha noisy_embedding_alpha"),
    **_group(_DETERMINISTIC, "deterministic full_determinism"),
    **_group(_HUB, "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision"),
    # -- otherwise here
    **_group(_BATCH, "per_device_train_batch_size micro_batch_size gradient_accumulation_steps batch_size"),
    **_group(_BATCH, "train_batch_size auto_find_batch_size average_tokens_across_devices"),
    **_group(_EVAL_BATCH, "per_device_eval_batch_size eval_batch_size eval_accumulation_steps batch_eval_metrics"),
    **_group(_PRECISION, "bf16 fp16 tf32 bfloat16 float16 float32 fp8 pure_bf16 bf16_full_eval fp16_full_eval"),
    **_group(_PRECISION, "mixed_precision upcast_layernorm"),
    **_group(_DATASETS, "dataset datasets dataset_name dataset_dir train_file validation_file eval_dataset"),
    **_group(_DATASETS, "test_datasets pretraining_dataset dataset_text_field dataset_config dataset_train_split"),
    **_group(_DATASETS, "dataset_test_split max_samples"),
    **_group(_QUANTIZATION, "quantization_method bnb_4bit_quant_type"),
    **_group(_QUANTIZATION, "bnb_4bit_compute_dtype use_bnb_nested_quant double_quantization gptq"),
    **_group(_PARALLEL, "fsdp fsdp_config fsdp_version deepspeed parallelism_config"),
    **_group(_LAUNCH, "accelerator_config local_rank world_size ddp ddp_backend ddp_timeout ddp_bucket_cap_mb"),
    **_group(_LAUNCH, "ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph use_cpu no_cuda device_map"),
    **_group(_LAUNCH, "log_on_each_node save_on_each_node"),
    **_group(_LOADER, "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_in_order"),
    **_group(_LOADER, "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context"),
    **_group(_LOADER, "remove_unused_columns label_names shuffle_dataset shuffle_merged_datasets streaming"),
    **_group(_LOADER, "dataset_streaming ignore_data_skip"),
    **_group(_LENGTHS, "group_by_length train_sampling_strategy length_column_name curriculum_sampling"),
    **_group(_EVALUATIONS, "eval_strategy evaluation_strategy evals_per_epoch eval_delay do_eval"),
    **_group(_SAVES, "save_strategy saves_per_epoch save_only_model enable_jit_checkpoint"),
    **_group(_LOGGING, "logging_strategy logging_first_step log_level log_level_replica disable_tqdm"),
    **_group(_LOGGING, "logging_nan_inf_filter include_num_input_tokens_seen plot_loss skip_memory_metrics debug"),
    **_group(_TRACKER_FLAGS, "use_wandb use_tensorboard use_mlflow use_swanlab use_comet use_trackio"),
    **_group(_TRACKER_PLACE, "logging_dir tensorboard_dir"),
    **_group(_TRACKER_RUNS, "wandb_run_id wandb_resume mlflow_run_id"),
    **_group(_TRACKER_SETTINGS, "wandb_entity wandb_mode wandb_watch wandb_log_model mlflow_tracking_uri"),
    **_group(_TRACKER_SETTINGS, "hf_mlflow_log_artifacts swanlab_mode swanlab_workspace swanlab_api_key"),
    **_group(_TRACKER_SETTINGS, "trackio_space_id trackio_bucket_id trackio_static_space_id"),
    **_group(_HUB_TOKEN, "hub_token hf_hub_token hf_use_auth_token use_auth_token"),
    **_group(_VERBS, "do_train do_predict predict_with_generate"),
    **_group(_RESUME, "resume_from_checkpoint auto_resume_from_checkpoints restore_callback_states_from_checkpoint"),
    "overwrite_output_dir": _OVERWRITE,
    "trust_remote_code": _REMOTE_CODE,
    "data_seed": _SEED,
    **_group(_ATTENTION, "flash_attn flash_attention sdp_attention xformers_attention flex_attention"),
    **_group(_ATTENTION, "eager_attention use_flash_attention_2"),
    **_group(_SHIFTED_ATTENTION, "s2_attention shift_attn"),
    **_group(_KERNELS, "use_liger_kernel liger_kernel_config enable_liger_kernel loss_type cut_cross_entropy"),
    **_group(_KERNELS, "liger_rope liger_rms_norm liger_layer_norm liger_glu_activation liger_cross_entropy"),
    **_group(_KERNELS, "liger_fused_linear_cross_entropy lora_mlp_kernel lora_qkv_kernel lora_o_kernel"),
    **_group(_TEMPLATE, "template chat_template_jinja default_system"),
    **_group(_VOCABULARY, "special_tokens resize_vocab"),
    **_group(_VOCABULARY, "resize_token_embeddings_to_32x"),
    "pad_token": _PADDING_TOKEN,
    "eos_token": _use(
        "the token that ends a turn is found from the chat template; to set another, see model.chat_template"
    ),
    **_group(_TOKENIZER, "tokenizer_type tokenizer_config tokenizer_name tokenizer_name_or_path use_fast_tokenizer"),
    **_group(_LORA_VARIANT, "loftq_config lora_bias bias"),
    **_group(_LORA_VARIANT, "relora layers_to_transform peft_layers_to_transform"),
    **_group(_SAVED_MODULES, "trainable_token_indices unfrozen_parameters"),
    **_group(_PLACEMENT, "mh_adapter output_adapter"),
    **_group(_ADAPTER_NORMS, "original_ln_before original_ln_after residual_before_ln adapter_residual_before_ln"),
    **_group(_ADAPTER_VARIANT, "ln_before ln_after cross_adapter inv_adapter leave_out use_gating phm_layer"),
    **_group(_ADAPTER_VARIANT, "init_weights stochastic_depth"),
    **_group(_MODEL_LOADING, "model_init_kwargs low_cpu_mem_usage model_type is_llama_derived_model use_cache"),
    **_group(_SUPERVISED, "stage rl pref_beta pref_loss ref_model reward_model task_type use_peft"),
    **_group(_CHECKPOINTING, "gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant"),
    **_group(_CHECKPOINTING, "disable_gradient_checkpointing"),
    **_group(_later("leave it out"), "activation_offloading"),
    **_group(_PADDING, "pad_to_sequence_len pad_to_multiple_of padding_free packing_strategy eval_packing"),
    **_group(_PADDING, "eval_sample_packing ignore_pad_token_for_loss"),
    **_group(_PREPARATION, "dataset_prepared_path dataset_processes dataset_num_proc dataset_kwargs tokenized_path"),
    **_group(_PREPARATION, "overwrite_cache preprocessing_num_workers preprocessing_batch_size"),
    **_group(_MIXING, "mix_strategy interleave_probs"),
    **_group(_TRAINER_ONLY, "optim_args optim_target_modules lr_scheduler_kwargs torch_compile_backend"),
    **_group(_TRAINER_ONLY, "torch_compile_mode torch_empty_cache_steps prediction_loss_only eval_do_concat_batches"),
    **_group(_TRAINER_ONLY, "eval_use_gather_object include_for_metrics greater_is_better strict plugins"),
    **_group(_TRAINER_ONLY, "truncation_mode router_aux_loss_coef"),
    "early_stopping_threshold": _use("set training.early_stopping_patience alone"),
    "train_on_eos": Refusal("the end of every trained turn is a target", "remove it", harmless=True),
    "loss_watchdog_threshold": _WATCHDOG,
    "loss_watchdog_patience": _WATCHDOG,
    "roles_to_train": _use("set data.train_on: assistant, last_assistant or all"),
}
"""A name -> what it means. A dotted name is looked up first (`*` stands for any number in a list, `train` for data.eval
too); a bare name counts at the top level and in the sections model, data, method and training."""

"""The words of a DeepSpeed JSON, as of DeepSpeed 0.19.8.

DeepSpeed ignores top-level words it does not know. A test holds these tables against the installed
DeepSpeed.
"""

from __future__ import annotations

_TOP = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    optimizer bf16 fp16 data_types zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer communication_data_type prescale_gradients gradient_predivide_factor
    aio checkpoint steps_per_print log_level dump_state wall_clock_breakdown memory_breakdown
    disable_python_gc timers flops_profiler comms_logger tensorboard wandb csv_monitor comet
"""
TOP: frozenset[str] = frozenset(_TOP.split())
"""Top-level words that dskd passes on."""

_LOADER = "dskd's own loader decides what a batch is; leave it out"
_COUNTS = "dskd divides by its own global counts, which needs the default; leave it out"
_PARALLEL = """
    pipeline tensor_parallel expert_parallel use_data_before_expert_parallelism
    sequence_parallel_size seq_parallel_communication_data_type
"""
_CHECKPOINTS = "dskd writes and reads checkpoints its own way; leave it out"
_REMOVED = """
    compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula
    progressive_layer_drop quantize_training sparse_attention sparse_gradients
"""

UNUSED: dict[str, str] = {
    "scheduler": "dskd sets the rate: train.lr, train.schedule, train.warmup; leave it out",
    "activation_checkpointing": "set train.activation_checkpointing instead",
    "compile": "set train.compile instead",
    "torch_autocast": "set train.precision instead",
    "bfloat16": "write bf16",
    "data_efficiency": _LOADER,
    "dataloader_drop_last": _LOADER,
    "gradient_allreduce_op": _COUNTS,
    "managed_gradient_accumulation": _COUNTS,
    **dict.fromkeys(_PARALLEL.split(), "dskd shards by ZeRO only; leave it out"),
    "hybrid_engine": "it is for generation in the training loop; leave it out",
    "autotuning": "it restarts the launcher with settings of its own; leave it out",
    "weight_quantization": "it is for inference; leave it out",
    "datastates_ckpt": _CHECKPOINTS,
    "disable_allgather": "without effect in DeepSpeed itself; leave it out",
    "vocabulary_size": "the tokenizer decides, see model.vocab_multiple; leave it out",
    "amp": "DeepSpeed has removed it; set train.precision instead",
    **dict.fromkeys(_REMOVED.split(), "DeepSpeed has removed it; leave it out"),
}
"""Top-level words that DeepSpeed has or had and dskd refuses, and why."""

NESTED: dict[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, words in {
        "optimizer": "type params legacy_fusion",
        "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads"
        " bf16_optimizer_states",
        "fp16": "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis"
        " consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads",
        "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
        "zero_optimization": """
            stage contiguous_gradients reduce_scatter reduce_bucket_size
            use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size overlap_comm
            compute_grad_norm load_from_fp32_weights elastic_checkpoint offload_param
            offload_optimizer zenflow sub_group_size stage3_prefetch_bucket_size
            stage3_param_persistence_threshold stage3_model_persistence_threshold
            stage3_max_live_parameters stage3_max_reuse_distance
            stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold
            stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
            ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment
            zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
            zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
            override_module_apply log_trace_cache_warnings enable_sanity_checks
            save_muon_momentum_buffer_in_memory leaf_module
            """,
        "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu"
        " pin_memory",
        "zero_optimization.offload_optimizer": "device nvme_path buffer_count pin_memory"
        " pipeline_read pipeline_write fast_init ratio super_offload cpuadam_cores_perc",
        "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
        "tensorboard": "enabled output_path job_name",
        "wandb": "enabled group team project",
        "csv_monitor": "enabled output_path job_name",
        "comet": "enabled samples_log_interval project workspace api_key experiment_name"
        " experiment_key online mode",
        "comms_logger": "enabled prof_all prof_ops verbose debug",
        "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules"
        " detailed output_file",
        "checkpoint": "tag_validation load_universal use_node_local_storage parallel_write writer"
        " checkpoint_serialization",
        "checkpoint.parallel_write": "pipeline_stage",
    }.items()
}
"""Words of the nested objects, by dotted name; other objects are passed on as they are."""

BROKEN: dict[str, str] = {
    "zero_optimization.round_robin_gradients": "with several ranks, checkpoints continued at "
    "another world size or stage get wrong weights in silence (DeepSpeed 0.19.8 maps parameters "
    "to other places); leave it out",
    "checkpoint.load_universal": _CHECKPOINTS,
    "checkpoint.use_node_local_storage": _CHECKPOINTS,
    "checkpoint.writer": _CHECKPOINTS,
}
"""Nested words that must not be set, by dotted name, and why."""

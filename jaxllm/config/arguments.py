"""vLLM's engine arguments that jaxllm does not act on: what happens to each, as data.

Three kinds: refused because the capability is not there yet, refused because the design leaves no room for it, and
accepted although it changes nothing here, which is said in one line of the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxllm.api.errors import ValidationError
from jaxllm.config.argument import is_inert, not_built, refuse_unless
from jaxllm.config.structured_outputs import BACKENDS

logger = logging.getLogger(__name__)

#: capability -> its arguments, each with the values that ask for nothing, where None and empty values never ask for
#: anything; further ones are fields already, made with `argument.not_yet`
NOT_YET: dict[str, dict[str, tuple[Any, ...]]] = {
    "parallelism": {
        "data_parallel_size_local": (1,),
        "data_parallel_rank": (0,),
        "data_parallel_start_rank": (0,),
        "data_parallel_backend": (),
        "data_parallel_address": (),
        "data_parallel_hybrid_lb": (False,),
        "data_parallel_external_lb": (False,),
        "data_parallel_multi_port_external_lb": (False,),
        "decode_context_parallel_size": (1,),
        "prefill_context_parallel_size": (1,),
        "nnodes": (1,),
        "node_rank": (0,),
        "master_addr": (),
        "master_port": (),
        "device_ids": (),
        "enable_elastic_ep": (False,),
        "enable_eplb": (False,),
        "eplb_config": (),
    },
    "a configuration of quantization beside config.json's": {
        "quantization_config": (),
    },
    "adapters that belong to kinds of media": {"default_mm_loras": ()},
    "multimodal input": {
        "mm_processor_cache_type": ("lru",),
        "mm_encoder_tp_mode": ("weights",),
        "media_io_kwargs": (),
        "interleave_mm_strings": (False,),
        "skip_mm_profiling": (False,),
        "enable_mm_embeds": (False,),
        "mm_encoder_only": (False,),
        "video_pruning_rate": (0,),
        "io_processor_plugin": (),
    },
    "this choice of what is offloaded (cpu_offload_gb offloads whole layers, kv_offloading_size the KV cache)": {
        "cpu_offload_params": (),
        "offload_group_size": (0,),
        "offload_num_in_group": (1,),
        "offload_prefetch_step": (1,),
        "offload_params": (),
        "offload_backend": ("auto",),
    },
    "transfer of the KV cache between engines": {
        "kv_transfer_config": (),
        "kv_events_config": (),
        "ec_transfer_config": (),
    },
    "logits processors by name pattern": {"logits_processor_pattern": ()},
    "this scheduling option": {
        "performance_mode": ("balanced",),
        "max_num_partial_prefills": (1,),
        "max_long_partial_prefills": (1,),
        "num_lookahead_slots": (0,),
        "preemption_mode": ("recompute",),
        "prefill_schedule_interval": (1,),
        "watermark": (0,),
        "max_num_queued_reqs": (),
        "max_num_queued_tokens": (),
        "max_num_scheduled_tokens": (),
        "scheduler_cls": (),
    },
    "profiling and tracing": {
        "otlp_traces_endpoint": (),
        "collect_detailed_traces": (),
        "kv_cache_metrics": (False,),
        "custom_histogram_buckets": (),
        "show_hidden_metrics_for_version": (),
        "enable_mfu_metrics": (False,),
        "enable_logging_iteration_details": (False,),
        "per_request_spec_decode_metrics": ("none",),
    },
    "this loading option": {
        "download_dir": (),
        "model_weights": (),
        "hf_config_path": (),
        "model_loader_extra_config": (),
        "ignore_patterns": ("original/**/*", ["original/**/*"]),
        "disable_sliding_window": (False,),
    },
}


class Never(NamedTuple):
    accepted: tuple[Any, ...]
    why: str


_NO_WORKERS = (
    "LLM.collective_rpc calls a function of the runner, LLM.update_weights takes tensors by Hugging Face's names"
)

NEVER: dict[str, Never] = {
    "code_revision": Never((), "jaxllm runs no code from checkpoints"),
    "model_impl": Never(("auto", "vllm"), "jaxllm has its own definition of every model"),
    "worker_use_ray": Never((False,), "jaxllm is one process, without workers"),
    "worker_cls": Never(("auto",), f"jaxllm is one process, without workers: {_NO_WORKERS}"),
    "worker_extension_cls": Never((), f"jaxllm is one process, without workers: {_NO_WORKERS}"),
    "weight_transfer_config": Never((), f"jaxllm is one process, without workers: {_NO_WORKERS}"),
    "reasoning_parser_plugin": Never((), "jaxllm runs no code for it: reasoning_parser is the name of one"),
    "language_model_only": Never((False,), "limit_mm_per_prompt={'image': 0, 'video': 0} leaves out what sees"),
    "watermark_config": Never((), "jaxllm does not mark what it generates"),
    "rope_scaling": Never((), "it is part of the model's config: hf_overrides={'rope_scaling': ...}"),
    "rope_theta": Never((), "it is part of the model's config: hf_overrides={'rope_theta': ...}"),
}


class NoEffect(NamedTuple):
    why: str
    #: values not worth a word
    quiet: tuple[Any, ...] = ()


_NO_GRAPHS = "there are no CUDA graphs, XLA compiles every step"
_ONE_KERNEL = "jaxllm picks its kernels itself"

#: vLLM's kernels, of 0.33 and before: asking for one of them has no effect
VLLM_ATTENTION_BACKENDS = frozenset(
    """AMX_MLA B12X CPU_ATTN CPU_MLA CUSTOM CUTLASS_MLA CUTLASS_MSA DIFFERENTIAL_FLASH_ATTN DUAL_CHUNK_FLASH_ATTN
    FLASHINFER FLASHINFER_MLA FLASHINFER_MLA_SPARSE FLASHINFER_MLA_SPARSE_DSV4 FLASHINFER_MLA_SPARSE_DSV41
    FLASHINFER_MLA_SPARSE_SM120 FLASHINFER_MLA_SPARSE_SM90 FLASHMLA FLASHMLA_MEGA_ATTN_DSV41 FLASHMLA_SPARSE
    FLASHMLA_SPARSE_DSV4 FLASHMLA_SPARSE_DSV41 FLASH_ATTN FLASH_ATTN_DIFFKV FLASH_ATTN_MLA FLASH_ATTN_MLA_SPARSE
    FLASH_ATTN_MLA_SPARSE_FA4 FLEX_ATTENTION HPC_ATTN IPEX MINIMAX_M3_SPARSE NO_ATTENTION PALLAS ROCM_AITER_FA
    ROCM_AITER_MLA ROCM_AITER_MLA_SPARSE ROCM_AITER_TRITON_MLA ROCM_AITER_UNIFIED_ATTN ROCM_ATTN ROCM_FLASH
    ROCM_FLASHMLA_SPARSE_DSV4 ROCM_FLASHMLA_SPARSE_DSV41 ROCM_OCTAVE ROCM_SEGMENTED_ATTN STEP5_DSA
    TOKENSPEED_MLA TORCH_SDPA TREE_ATTN TRITON_ATTN TRITON_ATTN_DIFFKV TRITON_FLASHINFER TRITON_FLASH_ATTN
    TRITON_MLA TRITON_MSA TURBOQUANT ULTRAQUANT XFORMERS XPU_MLA_SPARSE""".split()
)

#: accepted with any value
NO_EFFECT: dict[str, NoEffect] = {
    "trust_remote_code": NoEffect("jaxllm runs no code from checkpoints, it has its own models", (False,)),
    "use_v2_block_manager": NoEffect("there is one block manager"),
    "swap_space": NoEffect("preempted requests are recomputed, or come back from the host pool of kv_offloading_size"),
    "multi_step_stream_outputs": NoEffect("stream_interval is the number of tokens between two outputs"),
    "disable_async_output_proc": NoEffect("async_scheduling decides what overlaps", (False,)),
    "fully_sharded_loras": NoEffect(
        "adapters are split over devices as the matrices are that they belong to", (False,)
    ),
    "disable_custom_all_reduce": NoEffect("XLA does the reductions", (False,)),
    "max_seq_len_to_capture": NoEffect(_NO_GRAPHS),
    "max_context_len_to_capture": NoEffect(_NO_GRAPHS),
    "cudagraph_capture_sizes": NoEffect(_NO_GRAPHS),
    "cuda_graph_sizes": NoEffect(_NO_GRAPHS),
    "max_cudagraph_capture_size": NoEffect(_NO_GRAPHS),
    "cudagraph_metrics": NoEffect(_NO_GRAPHS, (False,)),
    "compilation_config": NoEffect("XLA compiles every step; enforce_eager=True compiles least"),
    "optimization_level": NoEffect("XLA compiles every step; enforce_eager=True compiles least"),
    "attention_config": NoEffect(_ONE_KERNEL),
    "disable_cascade_attn": NoEffect(_ONE_KERNEL, (False,)),
    "kernel_config": NoEffect(_ONE_KERNEL),
    "moe_backend": NoEffect(_ONE_KERNEL, ("auto",)),
    "linear_backend": NoEffect(_ONE_KERNEL, ("auto",)),
    "mm_encoder_attn_backend": NoEffect(_ONE_KERNEL),
    "enable_flashinfer_autotune": NoEffect(_ONE_KERNEL, (False, True)),
    "all2all_backend": NoEffect("XLA does what devices exchange"),
    "enable_dbo": NoEffect("XLA orders what devices compute and exchange", (False,)),
    "dbo_decode_token_threshold": NoEffect("XLA orders what devices compute and exchange"),
    "dbo_prefill_token_threshold": NoEffect("XLA orders what devices compute and exchange"),
    "enable_ep_weight_filter": NoEffect("each device reads its own experts", (False, True)),
    "expert_placement_strategy": NoEffect("neighbouring experts share a device", ("linear",)),
    "jit_monitor_mode": NoEffect("no step waits for a compiler"),
    "additional_config": NoEffect("it is for vLLM's platforms"),
    "fail_on_environ_validation": NoEffect("no variables of vLLM's are read", (False,)),
    "safetensors_load_strategy": NoEffect("each device's part of a tensor is read where it goes", ("lazy",)),
    "use_tqdm_on_load": NoEffect("the bar is shown on a terminal", (True,)),
    "max_lora_cls_labels": NoEffect("a class has as many labels as it has"),
    "sleep_mode_backend": NoEffect("every engine can sleep"),
    "enable_cumem_allocator": NoEffect("every engine can sleep", (False,)),
    "disable_hybrid_kv_cache_manager": NoEffect("layers of all kinds share one pool of blocks", (False,)),
    "guided_decoding_backend": NoEffect("structured outputs have one backend, guidance (llguidance)", BACKENDS),
    "disable_mm_preprocessor_cache": NoEffect("mm_processor_cache_gb=0 is its newer name", (False,)),
    "prefix_caching_hash_algo": NoEffect("blocks are always hashed with BLAKE2b"),
    "calculate_kv_scales": NoEffect("every key and value of a quantized KV cache has a scale of its own", (False,)),
    "disable_log_requests": NoEffect("requests are not logged", (True,)),
    "served_model_name": NoEffect("it is for jaxllm serve and run-batch"),
    "enable_log_requests": NoEffect("requests are not logged", (False,)),
    "tokenizer_pool_type": NoEffect("the tokenizer pool's workers are threads", ("thread",)),
    "tokenizer_pool_extra_config": NoEffect("the tokenizer pool's workers are threads"),
    "renderer_num_workers": NoEffect("tokenizer_pool_size is the number of threads that render and tokenize", (1,)),
    "enable_trace_replay": NoEffect("every engine takes trace_decode_token_ids", (False, True)),
    "enable_sleep_mode": NoEffect("every engine can sleep", (False, True)),
    "max_parallel_loading_workers": NoEffect("there is one process"),
    "distributed_executor_backend": NoEffect("there is one process, which has all devices", ("uni",)),
    "distributed_timeout_seconds": NoEffect("there is one process"),
    "numa_bind": NoEffect("there is one process: numactl binds it", (False,)),
    "numa_bind_nodes": NoEffect("there is one process: numactl binds it"),
    "numa_bind_cpus": NoEffect("there is one process: numactl binds it"),
    "ray_workers_use_nsight": NoEffect("there is one process", (False,)),
    "disable_nccl_for_dp_synchronization": NoEffect("there is one process"),
    "data_parallel_rpc_port": NoEffect("there is one process"),
    "pt_load_map_location": NoEffect("no torch is involved", ("cpu",)),
}


#: older name -> the argument that it is
ALIASES: dict[str, str] = {"num_scheduler_steps": "num_decode_steps"}


def known_names() -> set[str]:
    """The names of all three kinds, and the older ones of what the engine does act on."""
    return {name for names in NOT_YET.values() for name in names} | NEVER.keys() | NO_EFFECT.keys() | ALIASES.keys()


def refuse(arguments: Mapping[str, Any]) -> None:
    """Raise `ValidationError` for the first of the refused arguments that asks for something."""
    for capability, names in NOT_YET.items():
        for name, accepted in names.items():
            refuse_unless(name, arguments.get(name), accepted, not_built(capability))
    for name, (accepted, why) in NEVER.items():
        refuse_unless(name, arguments.get(name), accepted, f"not supported: {why}")


def attention_backend_of(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """`arguments` with vLLM's ``attention_config["backend"]`` under the name that jaxllm has for it.

    Raises:
        ValidationError: it is given under both names.
    """
    config = arguments.get("attention_config")
    if not isinstance(config, Mapping) or config.get("backend") is None:
        return arguments
    if arguments.get("attention_backend") is not None:
        raise ValidationError("attention_backend and attention_config['backend'] are two names of one thing; set one.")
    rest = {key: value for key, value in config.items() if key != "backend"}
    return {**arguments, "attention_config": rest, "attention_backend": config["backend"]}


def report_without_effect(arguments: Mapping[str, Any]) -> None:
    """Log, in one line, which of `arguments` change nothing and why."""
    reasons: dict[str, list[str]] = {}
    for name, (why, quiet) in NO_EFFECT.items():
        if name in arguments and not is_inert(arguments[name], quiet):
            reasons.setdefault(why, []).append(name)
    backend = arguments.get("attention_backend")
    if isinstance(backend, str) and backend.upper() in VLLM_ATTENTION_BACKENDS:
        reasons.setdefault(_ONE_KERNEL, []).append("attention_backend")
    if reasons:
        text = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
        logger.warning("These arguments have no effect in jaxllm: %s.", text)

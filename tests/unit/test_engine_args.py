"""Engine arguments: every one of vLLM's is honoured, named in the log, or refused; nothing is swallowed."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.capabilities import arguments_to_come

from jaxllm.api.errors import ValidationError
from jaxllm.config.arguments import NEVER, NO_EFFECT, NOT_YET, known_names
from jaxllm.config.engine_args import EngineArgs, engine_args
from jaxllm.config.parallel import Grid, ParallelConfig
from jaxllm.config.profiler import ProfilerConfig
from jaxllm.config.resolve import scheduler_config
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.config.speculative import SpeculativeConfig

FIELDS = {field.name for field in dataclasses.fields(EngineArgs)}

#: vLLM 0.33's LLM(): its own arguments and defaults, where they differ from None
VLLM_DEFAULTS: dict[str, Any] = {
    "runner": "auto",
    "convert": "auto",
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "trust_remote_code": False,
    "allowed_local_media_path": "",
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "dtype": "auto",
    "seed": 0,
    "gpu_memory_utilization": 0.92,
    "cpu_offload_gb": 0,
    "offload_group_size": 0,
    "offload_num_in_group": 1,
    "offload_prefetch_step": 1,
    "enforce_eager": False,
    "disable_custom_all_reduce": False,
    "kv_cache_dtype": "auto",
    "max_logprobs": 20,
    "logprobs_mode": "raw_logprobs",
    "load_format": "auto",
    "generation_config": "auto",
    "override_generation_config": {},
    "scheduling_policy": "fcfs",
    "long_prefill_token_threshold": 0,
    "long_prefill_token_threshold_adaptive": False,
    "scheduler_reserve_full_isl": True,
    "stream_interval": 1,
    "watermark": 0.0,
    "prefill_schedule_interval": 1,
    "disable_chunked_mm_input": False,
    "enable_expert_parallel": False,
    "enable_eplb": False,
    "enable_lora": False,
    "max_loras": 1,
    "max_lora_rank": 16,
    "lora_dtype": "auto",
    "fully_sharded_loras": False,
    "limit_mm_per_prompt": {},
    "mm_processor_cache_gb": 4,
    "mm_processor_cache_type": "lru",
    "mm_encoder_tp_mode": "weights",
    "skip_mm_profiling": False,
    "kv_cache_metrics": False,
    "cudagraph_metrics": False,
    "performance_mode": "balanced",
    "kv_offloading_backend": "native",
    "enable_sleep_mode": False,
}


def test_vllms_defaults_are_taken_without_a_word(caplog: pytest.LogCaptureFixture):
    args = engine_args("m", **VLLM_DEFAULTS)
    assert caplog.records == []
    assert dataclasses.replace(args, gpu_memory_utilization=0.9) == EngineArgs(model="m")


def test_none_is_the_default_everywhere(caplog: pytest.LogCaptureFixture):
    assert engine_args("m", **dict.fromkeys((FIELDS | known_names()) - {"model"})) == EngineArgs(model="m")
    assert caplog.records == []


def test_defaults():
    args = EngineArgs(model="m")
    assert (args.block_size, args.gpu_memory_utilization, args.max_logprobs, args.seed) == (None, 0.9, 20, 0)
    assert args.enable_chunked_prefill and args.enable_prefix_caching and args.async_scheduling
    assert (args.max_model_len, args.max_num_seqs, args.max_num_batched_tokens) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_model_len", "1k", 1000),
        ("max_model_len", "8K", 8192),
        ("max_model_len", "25.6k", 25600),
        ("max_model_len", "4096", 4096),
        ("max_model_len", np.int64(128), 128),
        ("max_model_len", -1, -1),
        ("max_model_len", "-1", -1),
        ("max_model_len", "auto", -1),
        # 1.001 * 1000 is 1000.9999999999999 in floats
        ("max_num_batched_tokens", "1.001k", 1001),
        ("kv_cache_memory_bytes", "2G", 2**31),
        ("kv_cache_memory_bytes", "4GB", 4 * 10**9),
        ("kv_cache_memory_bytes", "4 GiB", 4 * 2**30),
        ("kv_cache_memory_bytes", "0.5gib", 2**29),
        ("kv_cache_memory_bytes", "2Gi", 2**31),
        ("kv_cache_memory_bytes", "500MB", 500 * 10**6),
        ("dtype", "half", "float16"),
        ("dtype", "float", "float32"),
        ("dtype", "BFloat16", "bfloat16"),
        ("dtype", np.float32, "float32"),
        ("dtype", np.dtype("float16"), "float16"),
        ("device", "cuda", "gpu"),
        ("load_format", "GGUF", "gguf"),
        ("seed", -(2**63), -(2**63)),
        ("gpu_memory_utilization", 1, 1.0),
        ("generation_config", Path("some") / "place", str(Path("some") / "place")),
        ("tokenizer", Path("some"), Path("some")),
        ("max_logprobs", -1, -1),
        ("enable_chunked_prefill", False, False),
        ("hf_token", True, True),
    ],
)
def test_values_are_brought_into_one_form(name: str, value: Any, expected: Any):
    found = getattr(engine_args("m", **{name: value}), name)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("max_model_len", 0, "at least 1.* got 0"),
        ("max_model_len", "1.5", r"'1\.5'"),
        ("max_model_len", "12 apples", "'12 apples'"),
        ("max_model_len", 10.0, "integer, got 10.0"),
        ("max_num_seqs", 0, "at least 1, got 0"),
        ("max_num_seqs", True, "integer, got True"),
        ("max_num_seqs", 100_000_000, "at most 65536, got 100000000.*256 to 1024"),
        ("max_num_seqs", "1m", "at most 65536, got 1000000"),
        ("max_num_batched_tokens", -5, "at least 1, got -5"),
        ("long_prefill_token_threshold", -1, "at least 0, got -1"),
        ("block_size", 24, "8, 16, 32, 64 or 128 tokens, got 24"),
        ("block_size", 256, "got 256"),
        ("gpu_memory_utilization", 0, r"in \(0, 1\], got 0"),
        ("gpu_memory_utilization", 1.01, r"in \(0, 1\], got 1.01"),
        ("gpu_memory_utilization", float("nan"), "nan"),
        ("num_gpu_blocks_override", 1, "at least 2, got 1"),
        ("kv_cache_memory_bytes", 0, "at least 1, got 0"),
        ("kv_cache_memory_bytes", "4GW", "number of bytes such as 4294967296, '4GiB' or '500MB', got '4GW'"),
        ("dtype", "float8", "float32.*'float8'"),
        ("dtype", "fp16", "Did you mean 'float16'"),
        ("dtype", "BF16", "Did you mean 'bfloat16'"),
        ("tensor_parallel_size", "two", "be a whole number such as 1, 2 or 4, got 'two'"),
        ("data_parallel_size", "all", "such as 1, 2 or 4"),
        ("block_size", "small", "such as 16 or 64, got"),
        ("load_format", "pickle", "safetensors.*'pickle'"),
        ("scheduling_policy", "lifo", "fcfs, priority; got 'lifo'"),
        ("logprobs_mode", "raw", "raw_logprobs.*'raw'"),
        ("device", "tpu", "cpu.*'tpu'"),
        ("attention_backend", "cudnn", "auto, xla, triton, mosaic, .*got 'cudnn'"),
        ("enforce_eager", 1, "True or False, got 1"),
        ("max_logprobs", -2, "-1 for the whole vocabulary, got -2"),
        ("seed", 2**64, "64 bits"),
        ("hf_overrides", [1], r"dict.*\[1\]"),
        ("override_generation_config", {1: 2}, "string keys"),
        ("chat_template", 3, "got 3"),
        ("revision", "", "non-empty"),
        ("tokenizer", "", "path, got ''"),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: Any, text: str):
    with pytest.raises(ValidationError, match=f"^{name} .*{text}"):
        engine_args("m", **{name: value})


@pytest.mark.parametrize("model", [None, "", 7, b"m"])
def test_model_must_be_a_name_or_a_path(model: Any):
    with pytest.raises(ValidationError, match="^model must be"):
        engine_args(model)


@pytest.mark.parametrize(
    ("name", "close"), [("max_num_seq", "max_num_seqs"), ("tensor_parallel", "tensor_parallel_size"), ("qqq", None)]
)
def test_unknown_arguments_are_refused_by_name(name: str, close: str | None):
    with pytest.raises(TypeError) as error:
        engine_args("m", **{name: 1})
    hint = f" Did you mean {close!r}?" if close else ""
    assert str(error.value) == f"LLM() got an unexpected keyword argument {name!r}.{hint}"


def test_the_class_takes_what_llm_takes(caplog: pytest.LogCaptureFixture):
    make: Any = EngineArgs
    made = make("m", swap_space=4, num_scheduler_steps=2, enable_lora=False, attention_config={"backend": "xla"})
    assert made == engine_args("m", num_decode_steps=2, attention_backend="xla")
    (line,) = caplog.messages
    assert "swap_space" in line
    assert dataclasses.replace(made, seed=3) == EngineArgs(
        model="m", num_decode_steps=2, attention_backend="xla", seed=3
    )
    with pytest.raises(TypeError, match=r"EngineArgs\(\) got .* 'max_num_seq'. Did you mean 'max_num_seqs'\?"):
        make(model="m", max_num_seq=3)
    with pytest.raises(ValidationError, match="does not have adapters that belong to kinds of media"):
        make(model="m", default_mm_loras={"image": "a"})
    with pytest.raises(ValidationError, match="max_cpu_loras .1. must be greater than or equal to max_loras .2."):
        make(model="m", enable_lora=True, max_loras=2, max_cpu_loras=1)
    with pytest.raises(ValidationError, match="^model must be"):
        make()


@pytest.mark.parametrize("name", sorted(set().union(*arguments_to_come().values())))
def test_later_capabilities_are_refused(name: str):
    with pytest.raises(ValidationError, match=f"^{name}='something' is not supported yet: "):
        engine_args("m", **{name: "something"})


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_jaxllm_will_not_do_is_refused(name: str):
    with pytest.raises(ValidationError, match=f"^{name}='something' is not supported: "):
        engine_args("m", **{name: "something"})


def test_refusals_say_what_would_work():
    with pytest.raises(ValidationError, match="enable_eplb=True is not supported yet.* pass False"):
        engine_args("m", enable_eplb=True)
    with pytest.raises(ValidationError, match="jaxllm is one process, without workers.* pass False"):
        engine_args("m", worker_use_ray=True)
    with pytest.raises(ValidationError, match="'medusa' is not supported yet.* Pass 'ngram'"):
        engine_args("m", spec_method="medusa", num_speculative_tokens=5)


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_arguments_without_effect_are_named_in_one_line(name: str, caplog: pytest.LogCaptureFixture):
    assert engine_args("m", **{name: 77}) == EngineArgs(model="m")
    [record] = caplog.records
    assert name in record.getMessage() and NO_EFFECT[name].why in record.getMessage()


@pytest.mark.parametrize("name", ["FLASH_ATTN", "flashinfer", "TRITON_ATTN", "HPC_ATTN"])
def test_vllms_attention_kernels_stand_for_our_choice(name: str, caplog: pytest.LogCaptureFixture):
    assert engine_args("m", attention_backend=name).attention_backend == "auto"
    assert "attention_backend (jaxllm picks its kernels itself)" in caplog.text


@pytest.mark.parametrize("name", ["auto", "xla", "Triton"])
def test_our_attention_kernels_can_be_named(name: str, caplog: pytest.LogCaptureFixture):
    assert engine_args("m", attention_backend=name).attention_backend == name.lower()
    assert caplog.records == []


def test_attention_is_named_in_vllms_other_way_too(caplog: pytest.LogCaptureFixture):
    assert engine_args("m", attention_config={"backend": "xla"}).attention_backend == "xla"
    assert engine_args("m", attention_config={"backend": None}, attention_backend="xla").attention_backend == "xla"
    assert not any("attention_backend" in record.getMessage() for record in caplog.records)
    engine_args("m", attention_config={"backend": "FLASHINFER", "flash_attn_version": 3})
    assert "attention_config, attention_backend (jaxllm picks its kernels itself)" in caplog.text


@pytest.mark.parametrize("arguments", [{"attention_backend": "flashhh"}, {"attention_config": {"backend": "flashhh"}}])
def test_unknown_attention_is_refused_with_the_names_there_are(arguments: dict[str, Any]):
    with pytest.raises(ValidationError, match=r"one of auto, xla, triton, mosaic, .*FLASH_ATTN.* got 'flashhh'"):
        engine_args("m", **arguments)


def test_attention_under_two_names_is_refused():
    with pytest.raises(ValidationError, match="two names of one thing"):
        engine_args("m", attention_backend="xla", attention_config={"backend": "xla"})


def test_one_line_for_all_of_them(caplog: pytest.LogCaptureFixture):
    engine_args("m", swap_space=4, use_v2_block_manager=True, max_seq_len_to_capture=8192)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    for part in ("swap_space (", "use_v2_block_manager (", "max_seq_len_to_capture ("):
        assert part in record.getMessage()


def test_arguments_are_changed_as_vllms_scripts_change_them():
    """Set one after the other, or spread out of `asdict`, and checked as those of the constructor."""
    drafts: Any = {"method": "ngram", "num_speculative_tokens": 2}
    limits: Any = {"image": 1}
    args: Any = EngineArgs(model="m", limit_mm_per_prompt=limits, max_model_len=400, speculative_config=drafts)
    spread: dict[str, Any] = {**dataclasses.asdict(args), "seed": 3}
    assert engine_args(**spread) == dataclasses.replace(args, seed=3)
    limits = {"image": 0, "video": 0, "audio": 0} | dict(args.limit_mm_per_prompt or {})
    args.limit_mm_per_prompt, args.max_model_len, args.seed = limits, "1k", None
    expected: dict[str, Any] = {"limit_mm_per_prompt": {"image": 1, "video": 0}, "max_model_len": 1000, "seed": 0}
    assert args == EngineArgs(model="m", speculative_config=drafts, **expected)
    for steps, pooling in ((4, "MEAN"), (8, "CLS")):  # under their older names, one after the other
        args.num_scheduler_steps, args.override_pooler_config = steps, {"pooling_type": pooling}
        args.override_pooler_config = None
        assert (args.num_decode_steps, args.pooler_config.pooling_type) == (steps, pooling)
    args.num_decode_steps = args.pooler_config = None
    with pytest.raises(ValidationError, match="max_num_seqs must be at least 1, got 0"):
        args.max_num_seqs = 0
    with pytest.raises(TypeError, match="argument 'sed'. Did you mean 'seed'?"):
        args.sed = 1
    assert args == EngineArgs(model="m", speculative_config=drafts, **expected)


def test_every_name_has_one_fate():
    groups = [FIELDS, *(set(names) for names in NOT_YET.values()), set(NEVER), set(NO_EFFECT)]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_the_hubs_token_is_not_printed():
    assert "secret" not in repr(engine_args("m", hf_token="secret"))


def test_arguments_about_watching():
    args = engine_args("m")
    assert (args.disable_log_stats, args.metrics_port, args.profiler_config) == (None, None, ProfilerConfig())
    args = engine_args("m", disable_log_stats=False, metrics_port=0, profiler_config={"torch_profiler_dir": Path("p")})
    assert (args.disable_log_stats, args.metrics_port) == (False, 0)
    assert args.profiler_config == ProfilerConfig(torch_profiler_dir="p")
    for config in ({"profiler": "torch", "delay_iterations": 0}, ProfilerConfig(profiler="torch")):
        assert engine_args("m", profiler_config=config).profiler_config == ProfilerConfig(profiler="torch")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"disable_log_stats": "no"}, "disable_log_stats"),
        ({"metrics_port": 65536}, "metrics_port must be a TCP port, 0 .* to 65535, got 65536"),
        ({"metrics_port": -1}, "metrics_port must be a TCP port"),
        ({"metrics_port": 8000.0}, "metrics_port must be an integer"),
        ({"profiler_config": {"profiler": "cuda"}}, r"profiler_config\['profiler'\] must be one of torch, jax"),
        (
            {"profiler_config": {"delay_iterations": 3}},
            "profiler_config takes 'torch_profiler_dir' .*'delay_iterations'.=3",
        ),
        ({"profiler_config": "p"}, "profiler_config must be a dict"),
    ],
)
def test_wrong_arguments_about_watching(arguments: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text):
        engine_args("m", **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"structured_outputs_config": {"backend": "grammars"}},
            "has one backend, guidance .* pass 'auto' or 'guidance'",
        ),
        ({"structured_outputs_config": {"beckend": "auto"}}, "no field 'beckend'; its fields are backend, disable_any"),
        ({"structured_outputs_config": {"disable_any_whitespace": 1}}, "disable_any_whitespace must be True or False"),
        ({"structured_outputs_config": "guidance"}, "structured_outputs_config must be a dict"),
        ({"structured_outputs_config": {"reasoning_parser": "gpt"}}, "reasoning_parser='gpt' is not supported"),
        ({"structured_outputs_config": {"reasoning_parser_plugin": "a.py"}}, "no field 'reasoning_parser_plugin'"),
        ({"reasoning_parser": "gpt"}, "reasoning_config="),
        ({"reasoning_config": {"reasoning_start_str": 1}}, "reasoning_config.reasoning_start_str must be a string"),
        ({"stream_interval": 0}, "stream_interval must be at least 1"),
    ],
)
def test_structured_outputs_and_reasoning_are_checked(arguments: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text):
        engine_args("m", **arguments)


def test_other_backends_of_grammars_have_no_effect(caplog: pytest.LogCaptureFixture):
    args = engine_args("m", structured_outputs_config={"backend": "xgrammar"}, guided_decoding_backend="outlines")
    assert args.structured_outputs_config.backend == "guidance"
    assert "structured_outputs_config.backend='xgrammar' has no effect: jaxllm has one backend" in caplog.text
    assert "no effect in jaxllm: guided_decoding_backend (structured outputs have one backend" in caplog.text
    assert engine_args("m", distributed_executor_backend="mp", model_impl="vllm").grid.size == 1
    with pytest.raises(ValidationError, match="worker_extension_cls='a.B' .* LLM.update_weights takes tensors by"):
        engine_args("m", worker_extension_cls="a.B")


def test_structured_outputs_and_reasoning_come_as_dicts():
    args = engine_args(
        "m",
        structured_outputs_config={
            "backend": "guidance",
            "disable_any_whitespace": True,
            "reasoning_parser_plugin": "",
        },
        reasoning_config={"reasoning_parser": "mistral", "reasoning_end_str": "Enough.[/THINK]"},
        guided_decoding_backend="guidance",
    )
    assert args.structured_outputs_config.disable_any_whitespace
    reasoning = args.reasoning_config
    assert (reasoning.start, reasoning.end, reasoning.natural_end) == ("[THINK]", "Enough.[/THINK]", "[/THINK]")
    assert engine_args("m", structured_outputs_config=args.structured_outputs_config) == engine_args(
        "m", structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True}
    )


def test_the_mesh_has_its_sizes_from_the_arguments():
    args = engine_args("m", pipeline_parallel_size=1, enable_expert_parallel=False)
    assert isinstance(args, ParallelConfig) and args.tensor_parallel_size == 1
    assert engine_args("m", enable_expert_parallel=True).enable_expert_parallel
    assert engine_args("m", data_parallel_size=3, tensor_parallel_size="2").grid == (3, 1, 2)
    assert str(Grid(data=3, tensor=2)) == "data_parallel_size=3 x tensor_parallel_size=2"


def test_what_a_gguf_file_holds_may_be_named():
    assert engine_args("m", quantization="GGUF").quantization == "gguf"


NGRAM: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 3}


def test_a_number_of_drafts_by_batch_size():
    def limits(**fields: Any) -> SchedulerConfig:
        return scheduler_config(
            engine_args("m", speculative_config={**NGRAM, **fields}), max_model_len=512, platform="cpu"
        )

    name = "num_speculative_tokens_per_batch_size"
    for ranges in ([[1, 2, 3], [5, 6, 3], [7, 300, 0]], {"1-2": 3, "5-6": 3, "7-300": 0}):
        config = SpeculativeConfig(**NGRAM, num_speculative_tokens_per_batch_size=ranges)  # pyright: ignore
        assert [config.drafts_of(size) for size in (1, 2, 3, 5, 6, 7, 999)] == [3, 3, 3, 3, 3, 0, 0]
        found = limits(**{name: ranges})
        assert (found.max_draft_seqs, found.drafts_by_num_seqs) == (6, (3, 3, 3, 3, 3, 3))
    assert limits(**{name: [[2, 2, 1], [3, 3, 0]]}).drafts_by_num_seqs == (3, 1, 0, 0)
    assert limits().drafts_by_num_seqs == ()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be at least 1, got 0"),
        ({"num_speculative_tokens": 129}, "num_speculative_tokens must be at most 128, .* got 129"),
        ({"num_speculative_tokens": 2.5}, "num_speculative_tokens must be an integer"),
        ({"method": "guess"}, "method must be one of ngram, suffix, draft_model, eagle, eagle3, mtp; got 'guess'"),
        (
            {**NGRAM, "suffix_decoding_max_tree_depth": 9},
            "depth=9 is of method 'suffix', and method is 'ngram'",
        ),
        ({"method": "suffix", "suffix_decoding_max_tree_depth": 0}, "must be at least 1, got 0"),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": 0}, "must be more than 0"),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 1.5}, "must be between 0 and 1"),
        ({"method": "medusa"}, "'medusa' is not supported yet"),
        ({"method": "mimo_mtp"}, "'mimo_mtp' is not supported yet"),
        ({"method": "eagle3", "num_speculative_tokens": 3}, "model is missing: it is the folder of the head"),
        ({"method": "mtp", "prompt_lookup_min": 3}, "prompt_lookup_min=3 is of method 'ngram'"),
        ({"method": "ngram"}, "num_speculative_tokens is missing"),
        ({"num_speculative_tokens": 3}, "method is missing"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 4, "prompt_lookup_max": 2},
            r"min \(4\)",
        ),
        (
            {"method": 3, "num_speculative_tokens": 3},
            "method must be one of ngram, suffix, draft_model, eagle, eagle3, mtp; got 3",
        ),
        ({**NGRAM, "num_speculative_tokens_per_batch_size": 3}, "must be a list of .first batch size.* got 3"),
        ({**NGRAM, "num_speculative_tokens_per_batch_size": []}, "Leave it out for the same number"),
        ({**NGRAM, "num_speculative_tokens_per_batch_size": [[1, 4]]}, r"got \[\[1, 4\]\]"),
        ({**NGRAM, "num_speculative_tokens_per_batch_size": {"few": 3}}, "got {'few': 3}"),
        ({**NGRAM, "num_speculative_tokens_per_batch_size": [[1, 4, 3], [4, 9, 1]]}, r"got \[4, 9, 1\]"),
        ({**NGRAM, "num_speculative_tokens_per_batch_size": [[1, 4, 9]]}, "has 9 drafts, and .*=3 is the most"),
        ({**NGRAM, "num_speculative_tokens_per_batch_size": [[1, 4, -1]]}, r"got \[1, 4, -1\]"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"},
            "'probabilistic' is of method 'draft_model'",
        ),
        ({"method": "ngram", "num_speculative_tokens": 3, "quantization": "awq"}, "'awq' is of method 'draft_model'"),
        (
            {"model": "m", "num_speculative_tokens": 3, "prompt_lookup_min": 2},
            "prompt_lookup_min=2 is of method 'ngram'",
        ),
        ({"model": "m", "num_speculative_tokens": 3, "quantization": "Q"}, "speculative_config.quantization"),
        ({**NGRAM, "model": "m"}, "model='m' is of methods that need a model, and method is 'ngram'"),
        ({"method": "suffix", "model": "m"}, "and method is 'suffix'"),
    ],
)
def test_a_draft_is_checked(fields: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text):
        SpeculativeConfig(**fields)


def test_suffix_decoding_has_defaults():
    config = SpeculativeConfig(method="suffix")
    assert config.num_speculative_tokens == config.suffix_decoding_max_tree_depth == 24
    assert config.suffix_decoding_max_cached_requests == 10_000
    assert (config.suffix_decoding_max_spec_factor, config.suffix_decoding_min_token_prob) == (1.0, 0.1)
    assert SpeculativeConfig(method="suffix", num_speculative_tokens=5).num_speculative_tokens == 5
    for most, keeps in ((None, True), (0, False)):
        given = {"method": "suffix", "suffix_decoding_max_cached_requests": most}
        limits = scheduler_config(engine_args("m", speculative_config=given), max_model_len=512, platform="cpu")
        assert limits.keeps_outputs == keeps


def test_who_drafts_is_said_in_several_ways():
    whole = SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_min=2)
    assert (whole.model, whole.prompt_lookup_min, whole.prompt_lookup_max) == (None, 2, 2)
    ways: list[dict[str, Any]] = [
        {"speculative_config": whole},
        {"speculative_config": {"method": "NGRAM", "num_speculative_tokens": 3, "prompt_lookup_min": 2}},
        {"spec_method": "ngram", "spec_tokens": 3, "ngram_prompt_lookup_min": 2},
        {"speculative_config": {"method": "ngram_gpu", "prompt_lookup_min": 2}, "num_speculative_tokens": 3},
    ]
    assert all(engine_args("m", **way).speculative_config == whole for way in ways)
    assert SpeculativeConfig(method="ngram", model="[ngram]", num_speculative_tokens=3).method == "ngram"
    older = engine_args("m", speculative_model="[ngram]", num_speculative_tokens=5, ngram_prompt_lookup_max=4)
    config = older.speculative_config
    assert config is not None and (config.method, config.prompt_lookup_min, config.prompt_lookup_max) == ("ngram", 4, 4)
    for nothing in ({}, {"speculative_config": {}}, {"num_speculative_tokens": 0}, {"spec_model": None}):
        assert engine_args("m", **nothing).speculative_config is None
    assert SpeculativeConfig(model="[suffix]").method == "suffix"
    for asked in ({"speculative_model": "[ngram]"}, {"speculative_config": {"method": "ngram"}}):
        text = f"num_speculative_tokens=0 asks for no drafts, and {next(iter(asked))} for some"
        with pytest.raises(ValidationError, match=text):
            engine_args("m", **asked, num_speculative_tokens=0)
    with pytest.raises(ValidationError, match="spec_tokens=4 contradicts 3"):
        engine_args("m", spec_tokens=4, speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    with pytest.raises(ValidationError, match="Did you mean 'prompt_lookup_max'"):
        engine_args("m", speculative_config={"method": "ngram", "ngram_prompt_lookup_max": 4})
    with pytest.raises(ValidationError, match="two ways to say one thing"):
        engine_args("m", spec_tokens=4, speculative_config=whole)
    with pytest.raises(ValidationError, match="enforce_eager=True"):
        engine_args("m", speculative_config=whole, enforce_eager=True)


def test_a_model_that_drafts_is_checked_with_the_engines_arguments():
    own: dict[str, Any] = {"method": "draft_model", "num_speculative_tokens": 3, "draft_sample_method": "greedy"}
    older = engine_args("m", speculative_model="d", num_speculative_tokens=3, speculative_max_model_len=9)
    config = older.speculative_config
    assert config is not None and (config.method, config.model, config.max_model_len) == ("draft_model", "d", 9)
    with pytest.raises(ValidationError, match="draft_tensor_parallel_size=2 with tensor_parallel_size=1"):
        engine_args("m", speculative_config={**own, "draft_tensor_parallel_size": 2})
    assert engine_args("m", speculative_config={**own, "draft_tensor_parallel_size": 1})
    for name, method in (
        ("yuhuili/EAGLE3-LLaMA3.1", "eagle3"),
        ("EAGLE-LLaMA3", "eagle"),
        ("Llama-3.2", "draft_model"),
    ):
        config = engine_args("m", spec_model=name, spec_tokens=3, spec_method=None).speculative_config
        assert config is not None and config.method == method
    config = engine_args("m", speculative_config={"method": "deepseek_mtp", "quantization": "fp8"}).speculative_config
    assert config is not None and (config.method, config.num_speculative_tokens) == ("mtp", 1)
    for name, value in (("enable_prompt_embeds", True), ("kv_offloading_size", 1)):
        with pytest.raises(ValidationError, match=name):
            engine_args("m", speculative_config=own, **{name: value})

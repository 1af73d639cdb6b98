"""What scripts of vLLM's make of arguments before an engine runs, and engines of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import SMALL

from jaxllm import AsyncLLM, EngineArgs, LLMEngine, SamplingParams
from jaxllm.api.errors import ValidationError


def test_a_configuration_is_made_before_its_engine(tiny_model: Path):
    args = EngineArgs(model=str(tiny_model), **SMALL)
    config = args.create_engine_config(usage_context="any")
    assert args.create_model_config() == config.model_config
    assert config.cache_config.num_gpu_blocks is None
    engine = LLMEngine.from_vllm_config(config, usage_context="any", disable_log_stats=True)
    try:
        running = engine.vllm_config
        assert (running.model_config.max_model_len, running.scheduler_config) == (256, config.scheduler_config)
        assert (running.model_config.dtype, running.cache_config.block_size) == ("float32", 64)
        assert config.model_config.dtype == "float32" and config.cache_config.block_size == 64
        assert config.model_config.hf_config.vocab_size == 257
    finally:
        engine.shutdown()


@pytest.mark.parametrize("kind", [AsyncLLM, LLMEngine])
def test_classes_of_statistics_are_refused(tiny_model: Path, kind: Any):
    with pytest.raises(ValidationError, match="stat_loggers are not called: get_metrics"):
        kind.from_engine_args(EngineArgs(model=str(tiny_model)), stat_loggers=[object])


def test_arguments_that_contradict_the_model_are_refused(tiny_model: Path):
    with pytest.raises(ValidationError, match="max_model_len"):
        EngineArgs(model=str(tiny_model), max_model_len=100_000).create_model_config()


def test_parameters_of_a_request_where_none_is_the_default():
    made = SamplingParams.from_optional(
        n=1, temperature=None, top_p=None, max_tokens=None, logit_bias={"3": 500.0}, stop=None, seed=7
    )
    assert made == SamplingParams(max_tokens=None, logit_bias={3: 100.0}, seed=7)
    assert SamplingParams.from_optional() == SamplingParams()
    with pytest.raises(ValidationError, match="temperature"):
        SamplingParams.from_optional(temperature=-1.0)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        SamplingParams.from_optional(temperatur=1.0)

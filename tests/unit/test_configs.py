"""The shipped configurations and the user's own files: accepted, or refused with what is wrong."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.command_options import add_engine_options, engine_arguments
from jaxllm.config.engine_args import EngineArgs, engine_args
from jaxllm.config.files import load_config, merged, shipped_configs, with_overrides
from jaxllm.config.resolve import scheduler_config

NAMES = tuple(shipped_configs())
GPU_BYTES = {"l4": 24 * 10**9, "80g": 80 * 10**9, "h100": 80 * 10**9}


def read(name: str) -> tuple[Any, dict[str, Any]]:
    arguments = load_config(name)
    return merged(name, {} if "model" in arguments else {"model": "any"})


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_configuration_is_accepted(name: str):
    model, arguments = read(name)
    args = engine_args(model, **arguments)
    size = next((size for gpu, size in GPU_BYTES.items() if name.endswith(gpu)), 80 * 10**9)
    limits = scheduler_config(args, max_model_len=8192, platform="gpu", device_memory_bytes=size)
    assert limits.max_num_batched_tokens == args.max_num_batched_tokens, "more than a step can hold"


@pytest.mark.parametrize("name", NAMES)
def test_every_group_of_values_has_its_reason(name: str):
    """A configuration is read by people: what is set comes after why."""
    for paragraph in shipped_configs()[name].read_text().strip().split("\n\n"):
        assert paragraph.startswith("# "), paragraph


def test_the_named_ones_are_there():
    assert {"latency", "throughput", "small-memory", "smollm2-cpu", "llama-3.1-8b-l4", "qwq-32b-80g"} <= set(NAMES)


def test_a_users_file(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\nmax-model-len: 25.6k\nmax_num_seqs: 4\nhf_overrides: {rope_theta: 1e6}\n")
    assert load_config(path) == {
        "model": "m",
        "max_model_len": "25.6k",
        "max_num_seqs": 4,
        "hf_overrides": {"rope_theta": "1e6"},  # YAML 1.1: a float needs a point
    }
    model, arguments = merged(path, {"max_num_seqs": 8, "model": "n"})
    assert model == "n"
    args = engine_args(model, **arguments)
    assert (args.max_model_len, args.max_num_seqs) == (25600, 8)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(str(tmp_path / "empty.yaml")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq: 4", r"'max_num_seq' is not an engine argument. Did you mean 'max_num_seqs'\?"),
        ("- 1", "expected engine arguments"),
        ("a: [", "not a readable YAML file"),
        ("seed: 1\nseed: 2", "'seed' is there twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "'max_num_seqs' is there twice"),
        ("seed: !!python/object/apply:os.system [true]", "not a readable YAML file"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValidationError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thruput", "Did you mean 'throughput'"),
        ("no/such.yaml", "does not exist"),
        ("", "is a YAML file or a shipped one's name"),
    ],
)
def test_configurations_that_are_not_there(name: str, message: str):
    with pytest.raises(ValidationError, match=message):
        load_config(name)


def test_a_configuration_without_a_model():
    with pytest.raises(ValidationError, match="'latency' names no model: pass model="):
        merged("latency", {})


def test_the_command_line_wins_over_the_file_and_the_file_over_the_command():
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    given = parser.parse_args(["--config", "smollm2-cpu", "--max-num-seqs", "3"])
    model, arguments = engine_arguments(given, max_num_seqs=1, max_num_batched_tokens=8, seed=7)
    assert model == "smollm2-135m-instruct"
    assert arguments["max_num_seqs"] == 3
    assert arguments["max_num_batched_tokens"] == load_config("smollm2-cpu")["max_num_batched_tokens"]
    assert arguments["seed"] == 7
    assert EngineArgs(model=model, **arguments).device == "cpu"
    given = parser.parse_args(["--config", "smollm2-cpu", "--model", "other"])
    assert engine_arguments(given)[0] == "other"


def test_a_shorter_model_len_drops_the_files_threshold():
    config = {"long_prefill_token_threshold": 1024, "max_num_seqs": 4}
    assert with_overrides(config, {"max_model_len": 512}) == {"max_num_seqs": 4, "max_model_len": 512}
    assert with_overrides(config, {"max_model_len": 2048}) == {**config, "max_model_len": 2048}
    asked = {"max_model_len": 512, "long_prefill_token_threshold": 700}
    assert with_overrides(config, asked) == {"max_num_seqs": 4, **asked}

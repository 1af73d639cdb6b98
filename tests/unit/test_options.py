"""Every engine argument, and every one of vLLM's, is an option of the command line."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.command_options import add_engine_options, add_sampling_options, build_sampling_params, engine_arguments
from jaxllm.config.argument import GROUPS
from jaxllm.config.arguments import known_names, refuse
from jaxllm.config.command_line import FlexibleArgumentParser, with_hyphens
from jaxllm.config.engine_args import EngineArgs, argument_names, engine_args

EXAMPLES = {"max_model_len": ("auto", "auto")}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_engine_options(parser)
    return parser


def test_every_engine_argument_has_its_help():
    for field in dataclasses.fields(EngineArgs):
        assert bool(field.metadata["help"]) == (field.metadata["waits_for"] is None), field.name


@pytest.mark.parametrize("text", ["1.001k", "8K", "25.6k", "100", "0.5m"])
def test_a_count_is_the_same_from_the_command_line_and_from_python(parser: argparse.ArgumentParser, text: str):
    _, given = engine_arguments(parser.parse_args(["--max-num-batched-tokens", text]))
    assert EngineArgs(model="m", **given) == EngineArgs(model="m", max_num_batched_tokens=text)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("text", ["4GB", "4GiB", "4G", "4g", "500MB", "100"])
def test_a_size_is_the_same_from_the_command_line_and_from_python(parser: argparse.ArgumentParser, text: str):
    _, given = engine_arguments(parser.parse_args(["--kv-cache-memory-bytes", text]))
    assert EngineArgs(model="m", **given) == EngineArgs(model="m", kv_cache_memory_bytes=text)  # pyright: ignore[reportArgumentType]


def test_every_engine_argument_reaches_the_engine(parser: argparse.ArgumentParser):
    """Each option alone gives the argument, as a value of the field's own type."""
    for field in dataclasses.fields(EngineArgs):
        if field.name == "model":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if str(field.type) in ("bool", "bool | None"):
            assert engine_arguments(parser.parse_args([flag]))[1] == {field.name: True}
            assert engine_arguments(parser.parse_args([f"--no-{flag[2:]}"]))[1] == {field.name: False}
            continue
        kinds = (("str", ("x", "x")), ("dict", ('{"a": [1]}', {"a": [1]})), ("", ("1", 1)))
        by_type = next(example for kind, example in kinds if str(field.type).startswith(kind))
        text, value = EXAMPLES.get(field.name, by_type)
        assert engine_arguments(parser.parse_args([flag, text]))[1] == {field.name: value}
    assert engine_arguments(parser.parse_args([]))[1] == {}


def test_vllms_other_arguments_are_taken_and_told_about(parser: argparse.ArgumentParser):
    for name in sorted(known_names() - argument_names()):
        assert f"--{name.replace('_', '-')}" in parser._option_string_actions, name
    _, given = engine_arguments(parser.parse_args(["-pp", "4", "--swap-space", "8", "--enable-eplb"]))
    assert given == {"pipeline_parallel_size": 4, "swap_space": 8, "enable_eplb": True}
    with pytest.raises(ValidationError, match="pipeline_parallel_size=4|enable_eplb=True"):
        refuse(given)
    assert "--swap-space" not in parser.format_help()


@pytest.mark.parametrize("argv", [["--hf-overrides", "[1]"], ["--hf-overrides", "{"], ["--max-model-len", "long"]])
def test_values_of_another_type_are_refused(parser: argparse.ArgumentParser, argv: list[str]):
    with pytest.raises(SystemExit):
        parser.parse_args(argv)


def test_values_keep_their_underscores():
    assert with_hyphens(["--a_b=c_d", "e_f"]) == ["--a-b=c_d", "e_f"]


def test_a_script_may_build_its_parser_from_the_engine_arguments():
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model="m")
    parser.add_argument("--my-own", type=int)
    arguments = parser.parse_args(["--max_num_seqs", "4", "--no-enable-prefix-caching", "--my-own", "3"])
    assert arguments.max_model_len is None and arguments.gpu_memory_utilization == 0.9
    args = EngineArgs.from_cli_args(arguments)
    assert args == EngineArgs(model="m", max_num_seqs=4, enable_prefix_caching=False)
    given = vars(arguments)
    assert given.pop("my_own") == 3
    assert engine_args(**given) == args


def listed(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.Action]]:
    """Every option that ``--help`` shows: its name -> the title of its group, and what argparse knows of it."""
    return {
        action.dest: (group.title or "", action)
        for group in parser._action_groups
        for action in group._group_actions
        if action.help != argparse.SUPPRESS
    }


def test_help_says_what_every_value_looks_like(parser: argparse.ArgumentParser):
    for field in dataclasses.fields(EngineArgs):
        if field.name == "model" or field.metadata["help"] is None:
            continue
        _, action = listed(parser)[field.name]
        # what the command line reads is the field's type, as EngineArgs says it
        kind = str(field.type)
        if kind in ("bool", "bool | None"):
            assert action.nargs == 0
        elif kind.startswith("dict") or "Config" in kind or kind.startswith("tuple"):
            assert action.metavar == "JSON", field.name
        elif kind.startswith("int"):
            assert action.metavar in ("N", "N|auto", "BYTES", "PORT", "{8,16,32,64,128}"), field.name
        else:
            assert action.metavar not in ("N", "JSON", "VALUE"), field.name
    shown = parser.format_help()
    assert "--scheduling-policy {fcfs,priority}" in shown
    assert "--dtype {auto,float32,bfloat16,float16}" in shown
    assert "--max-model-len N|auto" in shown
    assert "--kv-cache-memory-bytes BYTES" in shown


@pytest.mark.parametrize("name", ["dtype", "load_format", "logprobs_mode", "device", "attention_backend", "block_size"])
def test_choices_that_are_shown_are_those_that_there_are(parser: argparse.ArgumentParser, name: str):
    metavar = listed(parser)[name][1].metavar
    assert isinstance(metavar, str)
    choices = metavar.strip("{}").split(",")
    for choice in choices:
        assert str(getattr(engine_args("m", **{name: choice}), name)) == choice
    with pytest.raises(ValidationError) as refusal:
        engine_args("m", **{name: 7})
    for choice in choices:
        assert choice in str(refusal.value) or name in ("dtype", "attention_backend")


def test_help_says_every_default(parser: argparse.ArgumentParser):
    defaults = EngineArgs(model="m")
    for name, (_, action) in listed(parser).items():
        if name not in ("help", "config"):
            assert action.help and action.help.count("(default: ") == 1, name
            default = getattr(defaults, name, None)
            if isinstance(default, (bool, int, float)) and default is not None:
                assert f"(default: {default})" in action.help, name


def test_help_groups_arguments_by_their_concern(parser: argparse.ArgumentParser):
    titles = {name: title for name, (title, _) in listed(parser).items()}
    assert titles["tokenizer"] == "model options"
    assert titles["block_size"] == titles["enable_prefix_caching"] == "cache options"
    assert titles["max_num_seqs"] == "scheduler options"
    assert titles["tensor_parallel_size"] == "parallel options"
    assert {field.metadata["group"] for field in dataclasses.fields(EngineArgs)} <= set(GROUPS)


def test_sampling_options_have_sampling_params_defaults():
    parser = argparse.ArgumentParser()
    add_sampling_options(parser, max_tokens=128)
    helps = {name: action.help or "" for name, (_, action) in listed(parser).items()}
    assert "(default: 128)" in helps["max_tokens"] and "(default: 1.0)" in helps["temperature"]
    assert "(default: 1)" in helps["n"] and "(default: False)" in helps["ignore_eos"]
    assert build_sampling_params(parser.parse_args([])) == SamplingParams(max_tokens=128)

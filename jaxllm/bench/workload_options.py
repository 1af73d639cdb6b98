"""Workloads that commands take: a file, or the shape of a dataset, which comes at some rate."""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.bench.options import add_arrival_options, add_dataset_options, count_option

if TYPE_CHECKING:
    from jaxllm.bench.datasets import BenchRequest
    from jaxllm.tuning.simulation.workload import Workload

#: datasets of lengths alone, which need no tokenizer
_SHAPES = ("random", "sharegpt_like", "prefix_repetition")
#: of a dataset
_NUM_PROMPTS = 1000
#: options that a file leaves nothing to, and what they are where nobody gives them
_OF_DATASETS = {
    "dataset_path": None,
    "input_len": None,
    "output_len": None,
    "dataset_name": "random",
    "random_range_ratio": 0.0,
    "random_prefix_len": 0,
    "burstiness": 1.0,
}
_OF_LINES = ("time_unit", "hash_block_size")


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add a file, and what makes a workload where there is none; the engine's ``--seed`` is the draw's."""
    parser.add_argument(
        "--workload",
        metavar="FILE",
        help='a trace that trace.save(FILE) wrote (.json), or lines of {"input_length": N, "output_length": N, '
        '"timestamp": T, "hash_ids": [...]} as in Mooncake\'s traces (.jsonl), in place of a dataset',
    )
    group = parser.add_argument_group("of lines of JSON")
    group.add_argument(
        "--time-unit", choices=("s", "ms"), help='of "timestamp" (default: whole numbers are milliseconds)'
    )
    count_option(group, "--hash-block-size", 'tokens that each of "hash_ids" stands for (default: what fits)')
    add_dataset_options(parser)
    add_arrival_options(parser)
    # of a file, all requests
    parser.set_defaults(num_prompts=None)


def is_described(arguments: argparse.Namespace) -> bool:
    """Whether anything says what the requests are: a file, or any option of a dataset."""
    given = [arguments.workload, arguments.num_prompts]
    return any(each is not None for each in given) or any(
        getattr(arguments, name) != default for name, default in _OF_DATASETS.items()
    )


def workload_of(arguments: argparse.Namespace) -> Workload:
    """The workload that the options describe.

    Raises:
        ValidationError: they do not go together, or the file is not what it should be.
    """
    from jaxllm.bench.datasets import arrivals
    from jaxllm.tuning.simulation.workload import Workload
    from jaxllm.tuning.simulation.workload_file import read_workload

    rate, limit = arguments.request_rate, arguments.max_concurrency
    if not (rate > 0 and 0 < arguments.burstiness < math.inf):
        raise ValidationError("--request-rate and --burstiness are above 0, and --burstiness is finite.")
    check_workload_options(arguments)
    if arguments.workload is None:
        requests = _dataset(arguments)
        prompts, lengths = zip(*((each.prompt_token_ids, each.output_len) for each in requests), strict=True)
        found = Workload.of_prompts(prompts, lengths, arrivals(arguments, requests), source=arguments.dataset_name)
        return dataclasses.replace(found, max_concurrency=limit)
    path = Path(arguments.workload)
    found = read_workload(
        path, time_unit=arguments.time_unit, piece_size=arguments.hash_block_size, count=arguments.num_prompts
    )
    if math.isfinite(rate) and not found.seconds:
        raise ValidationError(f"--request-rate: the requests of {path} come at once, and have no rate to change.")
    if math.isfinite(rate):
        found = found.at_rate(rate * found.seconds / max(len(found) - 1, 1))
    return dataclasses.replace(found, max_concurrency=limit)


def check_workload_options(arguments: argparse.Namespace) -> None:
    """Raise ValidationError for an option that the workload asked for has no use for."""
    path = None if arguments.workload is None else Path(arguments.workload)
    is_lines = path is not None and path.suffix != ".json"
    if not is_lines and (wrong := [name for name in _OF_LINES if getattr(arguments, name) is not None]):
        raise ValidationError(f"--{wrong[0].replace('_', '-')} is for a --workload of lines of JSON: leave it out.")
    wrong = [name for name, default in _OF_DATASETS.items() if getattr(arguments, name) != default]
    if path is not None and wrong:
        raise ValidationError(f"--{wrong[0].replace('_', '-')} is for datasets: {path} has requests of its own.")


def _dataset(arguments: argparse.Namespace) -> list[BenchRequest]:
    from jaxllm.bench.datasets import bench_tokenizer, read_dataset, shape_of_dataset

    name = arguments.dataset_name
    arguments.num_prompts = arguments.num_prompts or _NUM_PROMPTS
    if name == "random-mm":
        raise ValidationError("--dataset-name random-mm has pictures, which are not simulated.")
    if name in _SHAPES and arguments.dataset_path is None:
        return shape_of_dataset(arguments, random.Random(getattr(arguments, "seed", 0)))
    return read_dataset(arguments, bench_tokenizer(arguments))

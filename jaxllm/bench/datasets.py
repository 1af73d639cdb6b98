"""The datasets of the benchmarks say where prompts and lengths come from."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench.pictures import with_pictures
from jaxllm.command_options import engine_arguments
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.resolve import resolve, resolve_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("jaxllm")

#: tokens, where neither the options nor the file say otherwise: vLLM's defaults
INPUT_LEN, OUTPUT_LEN, CUSTOM_OUTPUT_LEN = 1024, 128, 256
#: vLLM leaves out conversations outside of these: tokens of prompt, of output, of both
SHORTEST, LONGEST_PROMPT, LONGEST_TOTAL = 4, 1024, 2048
#: mean tokens of ShareGPT's prompts and outputs (Kwon et al. 2023, "Efficient Memory Management for Large Language
#: Model Serving with PagedAttention", figure 11)
SHAREGPT_MEANS = (161.0, 338.0)
#: standard deviations of the lengths' logarithms: our choice of spread
SHAREGPT_SIGMAS = (1.2, 0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What a benchmark asks of an engine. The prompt is token ids, so that every engine computes the same."""

    prompt_token_ids: tuple[int, ...]
    #: tokens to generate, neither more nor fewer
    output_len: int
    #: seconds after the beginning at which it comes; None: the benchmark says when
    arrival_s: float | None = None
    #: (width, height, seed of the pixels) of each picture in front of the prompt
    pictures: tuple[tuple[int, int, int], ...] = ()


def bench_tokenizer(arguments: argparse.Namespace) -> PreTrainedTokenizerBase:
    """Return the tokenizer that datasets are made with: the model's, or that of ``--tokenizer``."""
    model, given = engine_arguments(arguments)
    named = given.get("tokenizer")
    # the model's revision is none of another tokenizer's
    revision = given.get("tokenizer_revision") or (None if named else given.get("revision"))
    path = resolve_tokenizer(named or model, revision=revision, token=given.get("hf_token"))
    return load_tokenizer(path, given.get("tokenizer_mode") or "auto")


def read_dataset(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> list[BenchRequest]:
    """Return the requests that the options describe; the same options and seed give the same requests.

    Args:
        vocab_size: of the model, where it is known (`model_vocabulary`).

    Raises:
        ValidationError: the options do not go together, or the file is not what it should be.
    """
    name, count, output_len = arguments.dataset_name, arguments.num_prompts, arguments.output_len
    path: Path | None = arguments.dataset_path
    draw = random.Random(getattr(arguments, "seed", 0))
    reads = name in ("sharegpt", "custom")
    if reads and path is None:
        hint = ", or use --dataset-name sharegpt_like, which needs no file" if name == "sharegpt" else ""
        raise ValidationError(f"--dataset-name {name} reads a file: give --dataset-path{hint}.")
    if not reads and path is not None:
        raise ValidationError(f"--dataset-name {name} makes its prompts itself and reads no --dataset-path.")
    if name not in ("random", "random-mm") and arguments.input_len is not None:
        instead = "--prefix-repetition-prefix-len and -suffix-len" if name == "prefix_repetition" else "--num-prompts"
        raise ValidationError(f"--dataset-name {name} has lengths of its own, not --input-len; see {instead}.")
    if path is not None:
        return (read_sharegpt if name == "sharegpt" else read_custom)(path, tokenizer, count, draw, output_len)
    requests = _drawn(arguments, draw, ordinary_ids(tokenizer, vocab_size))
    if name != "random-mm":
        return requests
    return with_pictures(
        requests,
        draw,
        count=arguments.random_mm_base_items_per_request,
        range_ratio=arguments.random_mm_num_mm_items_range_ratio,
        buckets=arguments.random_mm_bucket_config,
    )


def arrivals(arguments: argparse.Namespace, requests: list[BenchRequest]) -> list[float]:
    """Return the seconds from the beginning to each request.

    They are the trace's own, or those of a Poisson process at the rate asked for (with a burstiness other than 1,
    intervals are gamma-distributed, as in vLLM), or 0 without a rate.
    """
    given = [request.arrival_s for request in requests if request.arrival_s is not None]
    if given and len(given) < len(requests):
        raise ValidationError(f'only {len(given)} of {len(requests)} lines of the trace have a "timestamp".')
    rate = arguments.request_rate
    if math.isfinite(rate):
        draw = random.Random(getattr(arguments, "seed", 0))
        shape = arguments.burstiness
        intervals = [draw.gammavariate(shape, 1 / (rate * shape)) for _ in requests]
        return [0.0, *itertools.accumulate(intervals[1:])]
    return [stamp - min(given) for stamp in given] if given else [0.0] * len(requests)


def shape_of_dataset(arguments: argparse.Namespace, draw: random.Random) -> list[BenchRequest]:
    """The same lengths and shared beginnings, without a tokenizer: ids mean nothing.

    Raises:
        ValidationError: the options do not go together.
    """
    if arguments.dataset_name != "random" and arguments.input_len is not None:
        raise ValidationError(f"--dataset-name {arguments.dataset_name} has lengths of its own, not --input-len.")
    return _drawn(arguments, draw, list(range(2**15)))


def _drawn(arguments: argparse.Namespace, draw: random.Random, ids: list[int]) -> list[BenchRequest]:
    """Requests of a dataset that makes its prompts itself."""
    name, count, output_len = arguments.dataset_name, arguments.num_prompts, arguments.output_len
    if name == "sharegpt_like":
        return sharegpt_like(ids, count, draw, output_len)
    if name == "prefix_repetition":
        lengths = {
            option: getattr(arguments, f"prefix_repetition_{option}")
            for option in ("num_prefixes", "prefix_len", "suffix_len")
        }
        return prefix_repetition(ids, count, draw, output_len=output_len or OUTPUT_LEN, **lengths)
    return random_lengths(
        ids,
        count,
        draw,
        input_len=arguments.input_len or INPUT_LEN,
        output_len=output_len or OUTPUT_LEN,
        range_ratio=arguments.random_range_ratio,
        prefix_len=arguments.random_prefix_len,
    )


def ordinary_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> list[int]:
    """Return the vocabulary without special tokens.

    Args:
        vocab_size: of the model, where it is known: a tokenizer may have more tokens.
    """
    size = len(tokenizer) if vocab_size is None else min(len(tokenizer), vocab_size)
    return sorted(set(range(size)) - set(tokenizer.all_special_ids))


def model_vocabulary(arguments: argparse.Namespace) -> int | None:
    """Return how many tokens the model of a benchmark has; None: its files do not say so."""
    model, given = engine_arguments(arguments)
    path = resolve(model, revision=given.get("revision"), token=given.get("hf_token"))
    # what is wrong with them the engine tells, which a server's client has none of
    with contextlib.suppress(ValidationError, WeightsError):
        config = Checkpoint(path, given.get("load_format") or "auto", given.get("hf_overrides")).config
        return (config.get("text_config") or config).get("vocab_size")
    return None


def bench_ids(arguments: argparse.Namespace) -> list[int]:
    """Return the tokens that random prompts are drawn of: those that the tokenizer and the model both have."""
    return ordinary_ids(bench_tokenizer(arguments), model_vocabulary(arguments))


def random_lengths(
    ids: list[int],
    count: int,
    draw: random.Random,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
) -> list[BenchRequest]:
    """Draw random tokens.

    Lengths are uniform in [n (1 - range_ratio), n (1 + range_ratio)], as in vLLM, and at least 1.

    Args:
        prefix_len: tokens before these that all prompts share.
    """
    if not 0 <= range_ratio < 1:
        raise ValidationError(f"--random-range-ratio must be in [0, 1), got {range_ratio:g}.")

    def length(mean: int) -> int:
        return draw.randint(max(1, math.floor(mean * (1 - range_ratio))), max(1, math.ceil(mean * (1 + range_ratio))))

    prefix = tuple(draw.choices(ids, k=prefix_len))
    return [
        BenchRequest(
            prompt_token_ids=prefix + tuple(draw.choices(ids, k=length(input_len))), output_len=length(output_len)
        )
        for _ in range(count)
    ]


def sharegpt_like(ids: list[int], count: int, draw: random.Random, output_len: int | None = None) -> list[BenchRequest]:
    """Draw random tokens, with lengths like those of ShareGPT's conversations, for machines that do not have the file.

    Lengths are lognormal with `SHAREGPT_MEANS` before vLLM's filter, which they pass as the file's do: a draw outside
    of it is drawn again.
    """
    centres = [math.log(mean) - sigma**2 / 2 for mean, sigma in zip(SHAREGPT_MEANS, SHAREGPT_SIGMAS, strict=True)]
    requests: list[BenchRequest] = []
    while len(requests) < count:
        lengths = (draw.lognormvariate(*pair) for pair in zip(centres, SHAREGPT_SIGMAS, strict=True))
        prompt, output = map(round, lengths)
        if _passes(prompt, output):
            tokens = tuple(draw.choices(ids, k=prompt))
            requests.append(BenchRequest(prompt_token_ids=tokens, output_len=output_len or output))
    return requests


def prefix_repetition(
    ids: list[int],
    count: int,
    draw: random.Random,
    *,
    num_prefixes: int,
    prefix_len: int,
    suffix_len: int,
    output_len: int,
) -> list[BenchRequest]:
    """Draw few prefixes, which many prompts with suffixes of their own share, in random order. As in vLLM, every prefix
    is used ``count // num_prefixes`` times.
    """
    each = count // num_prefixes if num_prefixes > 0 else 0
    if each == 0:
        raise ValidationError(
            f"--num-prompts ({count}) must be at least --prefix-repetition-num-prefixes ({num_prefixes}, at least 1)."
        )
    if each * num_prefixes < count:
        logger.warning(
            "%d of %d prompts: each of %d prefixes has as many as the others", each * num_prefixes, count, num_prefixes
        )
    prompts = []
    for _ in range(num_prefixes):
        prefix = tuple(draw.choices(ids, k=prefix_len))
        prompts += [prefix + tuple(draw.choices(ids, k=suffix_len)) for _ in range(each)]
    draw.shuffle(prompts)
    return [BenchRequest(prompt_token_ids=prompt, output_len=output_len) for prompt in prompts]


def read_sharegpt(
    path: Path, tokenizer: PreTrainedTokenizerBase, count: int, draw: random.Random, output_len: int | None
) -> list[BenchRequest]:
    """Read prompts and the lengths of answers, the first turns of a ShareGPT JSON file, in random order."""
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
        turns = [[turn["value"] for turn in entry["conversations"][:2]] for entry in conversations]
        if not all(isinstance(text, str) for turn in turns for text in turn):
            raise TypeError("a value is not a text")
    except OSError as error:
        raise ValidationError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValidationError(
            f"{path} is not ShareGPT's JSON, a list of {{'conversations': [{{'value': TEXT}}, ...]}}: {error!r}"
        ) from None
    turns = [turn for turn in turns if len(turn) == 2]
    draw.shuffle(turns)
    requests: list[BenchRequest] = []
    for question, answer in turns:
        if len(requests) == count:
            break
        ids = _ids(tokenizer, question)
        output = output_len or len(_ids(tokenizer, answer))
        if _passes(len(ids), output if output_len is None else SHORTEST):
            requests.append(BenchRequest(prompt_token_ids=ids, output_len=output))
    return _repeated(requests, count, path)


def read_custom(
    path: Path, tokenizer: PreTrainedTokenizerBase, count: int, _: random.Random, output_len: int | None
) -> list[BenchRequest]:
    """Read lines of ``{"prompt": TEXT or token ids, "output_tokens": N, "timestamp": SECONDS}``; the last two may lack.

    Args:
        output_len: in place of every line's own.
    """
    requests = []
    for number, row in _rows(path):
        if len(requests) == count:
            break
        prompt, length = row.get("prompt"), output_len or row.get("output_tokens", CUSTOM_OUTPUT_LEN)
        arrival = row.get("timestamp")
        ids: tuple[int, ...] = ()
        if isinstance(prompt, list):
            ids = tuple(prompt)
        elif isinstance(prompt, str):
            ids = _ids(tokenizer, prompt)
        good = ids and all(isinstance(i, int) for i in ids) and isinstance(length, int) and length > 0
        if not good or not (arrival is None or (isinstance(arrival, int | float) and math.isfinite(arrival))):
            raise ValidationError(
                f'{path}, line {number}: expected {{"prompt": TEXT or token ids}}, with "output_tokens" (a whole '
                f'number above 0) and "timestamp" (seconds) if wanted; got {str(row)[:200]}'
            )
        requests.append(BenchRequest(prompt_token_ids=ids, output_len=length, arrival_s=arrival))
    timed = bool(requests) and requests[0].arrival_s is not None
    return requests if timed else _repeated(requests, count, path)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    yield number, row if isinstance(row, dict) else {"prompt": row}
    except OSError as error:
        raise ValidationError(f"{path} cannot be read: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise ValidationError(f"{path}, line {number}, is not JSON: {error.msg}, column {error.colno}") from None
    except ValueError as error:
        raise ValidationError(f"{path} cannot be read as lines of JSON, behind line {number}: {error}") from None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text))


def _passes(prompt: int, output: int) -> bool:
    return SHORTEST <= prompt <= LONGEST_PROMPT and output >= SHORTEST and prompt + output <= LONGEST_TOTAL


def _repeated(requests: list[BenchRequest], count: int, path: Path) -> list[BenchRequest]:
    """Return `count` requests: those of a file with fewer are repeated from its beginning, as in vLLM."""
    if not requests:
        raise ValidationError(f"{path} has no prompt that can be used.")
    return [requests[index % len(requests)] for index in range(count)]

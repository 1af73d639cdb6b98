"""``jaxllm bench throughput``: a dataset as one batch, as fast as it goes; alone or against other engines."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench import plot, report
from jaxllm.bench.datasets import read_dataset
from jaxllm.bench.peers.protocol import Request, timed_round
from jaxllm.bench.rates import Samples, Sizes
from jaxllm.bench.requests import BenchRequest
from jaxllm.bench.session import JaxLLMSession
from jaxllm.bench.tokenizers import bench_tokenizer
from jaxllm.command_options import build_llm


def run(arguments: argparse.Namespace) -> int:
    """Measure, print vLLM's lines, write JSON and plot where asked for."""
    _check(arguments)
    plot.require(arguments.plot)
    cases = read_cases(arguments)
    if arguments.compare is not None:
        results, lines = _compared(arguments, cases)
    else:
        results, lines = _alone(arguments, cases)
    report.write(arguments.output_json, arguments, results)
    if arguments.plot:
        plot.draw(arguments.plot, lines, x="requests at once", y="tokens/s")
    return 0


def read_cases(arguments: argparse.Namespace) -> list[list[BenchRequest]]:
    """The dataset, or one of each size of ``--sweep-num-prompts``."""
    tokenizer = bench_tokenizer(arguments)
    cases = []
    for count in arguments.sweep_num_prompts or [arguments.num_prompts]:
        own = copy.copy(arguments)
        own.num_prompts = count
        cases.append(read_dataset(own, tokenizer))
    return cases


def plain(requests: list[BenchRequest], output_len: int | None = None) -> list[Request]:
    """As sessions take them; `output_len` replaces all their lengths."""
    return [(list(request.prompt_token_ids), output_len or request.output_len) for request in requests]


def vllm_lines(sizes: Sizes, medians: dict[str, float]) -> str:
    """What ``vllm bench throughput`` prints."""
    return (
        f"Throughput: {medians['requests_per_s']:.2f} requests/s, {medians['total_tokens_per_s']:.2f} total tokens/s, "
        f"{medians['output_tokens_per_s']:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {sizes.prompt_tokens}\n"
        f"Total num output tokens:  {sizes.output_tokens}"
    )


def _alone(
    arguments: argparse.Namespace, cases: list[list[BenchRequest]]
) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    done: list[Samples] = []
    with build_llm(arguments) as llm:
        session = JaxLLMSession(llm, detokenize=not arguments.disable_detokenize)
        for case in cases:
            session.check(plain(case))
        for case in cases:
            samples = Samples(sizes=Sizes.of(case))
            for turn in range(-arguments.num_iters_warmup, arguments.num_iters):
                prefill = None if arguments.no_phases else timed_round(session, plain(case, 1))["seconds"]
                seconds = timed_round(session, plain(case))["seconds"]
                if turn >= 0:
                    samples.seconds.append(seconds)
                    samples.prefill_seconds += [] if prefill is None else [prefill]
            medians = samples.medians()
            print(vllm_lines(samples.sizes, medians))
            if "decode_tokens_per_s" in medians:
                print(
                    f"Prefill: {medians['prefill_tokens_per_s']:.2f} prompt tokens/s, "
                    f"decode: {medians['decode_tokens_per_s']:.2f} output tokens/s"
                )
            done.append(samples)
        engine = session.facts
    results = {"engine": engine, "cases": [samples.record() for samples in done]}
    return results, {"jaxllm": [_point(samples) for samples in done]}


def _compared(
    arguments: argparse.Namespace, cases: list[list[BenchRequest]]
) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    from jaxllm.bench.compare import Comparison

    comparison = Comparison(arguments, cases)
    comparison.run()
    print(comparison.table())
    lines = {name: [_point(samples[name]) for samples in comparison.samples] for name in comparison.names}
    return comparison.record(), lines


def _point(samples: Samples) -> tuple[float, float]:
    medians = samples.medians()
    return samples.sizes.num_requests, next(
        medians[name] for name in ("decode_tokens_per_s", "output_tokens_per_s") if name in medians
    )


def _check(arguments: argparse.Namespace) -> None:
    if arguments.include_startup and arguments.compare is None:
        raise ValidationError("--include-startup compares engines: give --compare, or use `jaxllm bench startup`.")
    if arguments.compare is None and (arguments.peer_python or arguments.gguf or arguments.threads):
        raise ValidationError("--peer-python, --gguf and --threads are for --compare.")

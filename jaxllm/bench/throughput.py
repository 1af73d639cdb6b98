"""``jaxllm bench throughput`` times a dataset as one batch, as fast as it goes, alone or against other engines."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench import plot, report
from jaxllm.bench.against import Variants
from jaxllm.bench.datasets import BenchRequest, bench_tokenizer, model_vocabulary, read_dataset
from jaxllm.bench.measurements import Samples, turns
from jaxllm.bench.peers.protocol import Request, timed_round
from jaxllm.bench.pictures import PictureSession
from jaxllm.bench.session import JaxLLMSession
from jaxllm.command_options import build_llm


def run(arguments: argparse.Namespace) -> int:
    """Measure, print vLLM's lines, write JSON and plot where asked for."""
    if arguments.include_startup and arguments.compare is None:
        raise ValidationError("--include-startup compares engines: give --compare, or use `jaxllm bench startup`.")
    if arguments.compare is None and (arguments.peer_python or arguments.gguf or arguments.threads):
        raise ValidationError("--peer-python, --gguf and --threads are for --compare.")
    if arguments.compare is not None and arguments.dataset_name == "random-mm":
        raise ValidationError("--dataset-name random-mm is not for --compare, whose engines get tokens alone.")
    if arguments.against and (arguments.compare is not None or arguments.dataset_name == "random-mm"):
        raise ValidationError("--against is for engines of this process and for tokens alone: leave it out here.")
    plot.require(arguments.plot)
    tokenizer, vocab_size = bench_tokenizer(arguments), model_vocabulary(arguments)
    cases: list[list[BenchRequest]] = []
    for count in arguments.sweep_num_prompts or [arguments.num_prompts]:
        sized = copy.copy(arguments)
        sized.num_prompts = count
        cases.append(read_dataset(sized, tokenizer, vocab_size))
    measure = _against if arguments.against else _alone if arguments.compare is None else _compared
    results, samples = measure(arguments, cases)
    report.write(arguments.output_json, arguments, results)
    if arguments.plot:
        lines = {name: list(map(_point, found)) for name, found in samples.items()}
        plot.draw(arguments.plot, lines, x="requests at once", y="tokens/s")
    return 0


def _alone(
    arguments: argparse.Namespace, cases: list[list[BenchRequest]]
) -> tuple[dict[str, Any], dict[str, list[Samples]]]:
    done: list[Samples] = []
    with build_llm(arguments) as llm:
        every, detokenize = [request for case in cases for request in case], not arguments.disable_detokenize
        session = JaxLLMSession(llm, detokenize=detokenize)
        if any(request.pictures for request in every):
            session = PictureSession(llm, every, detokenize=detokenize)
        for case in cases:
            session.check(_plain(case))
        for case in cases:
            samples = Samples.of(case)
            for turn in turns(arguments):
                prefill = None if arguments.no_phases else timed_round(session, _plain(case, 1))["seconds"]
                samples.add(turn, timed_round(session, _plain(case))["seconds"], prefill)
            _show(samples)
            done.append(samples)
        report.show_drafts(drafts := session.drafts())
    cases_done = [samples.record() for samples in done]
    return {"engine": session.facts, "cases": cases_done, "drafts": drafts}, {"jaxllm": done}


def _compared(
    arguments: argparse.Namespace, cases: list[list[BenchRequest]]
) -> tuple[dict[str, Any], dict[str, list[Samples]]]:
    from jaxllm.bench.compare import Comparison

    comparison = Comparison(arguments, cases)
    comparison.run()
    print(comparison.table())
    return comparison.record(), {name: [case[name] for case in comparison.samples] for name in comparison.names}


def _against(
    arguments: argparse.Namespace, cases: list[list[BenchRequest]]
) -> tuple[dict[str, Any], dict[str, list[Samples]]]:
    names = Variants.names(arguments)
    samples = [{name: Samples.of(case) for name in names} for case in cases]
    variants = Variants(arguments, list(map(_plain, cases)), samples)
    variants.run()
    print(variants.table())
    return variants.record(), {name: [case[name] for case in samples] for name in names}


def _plain(requests: list[BenchRequest], output_len: int | None = None) -> list[Request]:
    """Return the requests as sessions take them; `output_len` replaces all their lengths."""
    return [(list(request.prompt_token_ids), output_len or request.output_len) for request in requests]


def _show(samples: Samples) -> None:
    """Print what ``vllm bench throughput`` prints, and the phases."""
    medians = samples.medians()
    print(
        f"Throughput: {medians['requests_per_s']:.2f} requests/s, {medians['total_tokens_per_s']:.2f} total tokens/s, "
        f"{medians['output_tokens_per_s']:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {samples.prompt_tokens}\n"
        f"Total num output tokens:  {samples.output_tokens}"
    )
    if samples.num_images:
        print(f"Images: {medians['images_per_s']:.2f} images/s, {samples.num_images} in all")
    if "decode_tokens_per_s" in medians:
        print(
            f"Prefill: {medians['prefill_tokens_per_s']:.2f} prompt tokens/s, "
            f"decode: {medians['decode_tokens_per_s']:.2f} output tokens/s"
        )


def _point(samples: Samples) -> tuple[float, float]:
    medians = samples.medians()
    return samples.num_requests, medians.get("decode_tokens_per_s", medians["output_tokens_per_s"])

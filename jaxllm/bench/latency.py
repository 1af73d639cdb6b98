"""``jaxllm bench latency``: one batch of equal requests, again and again; or decoding by context and cache size."""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench import plot, report
from jaxllm.bench.datasets import ordinary_ids
from jaxllm.bench.peers.protocol import Request, timed_round
from jaxllm.bench.rates import Samples, Sizes
from jaxllm.bench.session import JaxLLMSession
from jaxllm.bench.statistics import percentile, summary
from jaxllm.bench.tokenizers import bench_tokenizer
from jaxllm.command_options import build_llm

#: what vLLM prints
PERCENTAGES = (10, 25, 50, 75, 90, 99)


@dataclasses.dataclass(kw_only=True)
class Decoding:
    """How long a token took at one context length and cache size."""

    #: tokens of each prompt
    context: int
    #: blocks of the KV cache
    num_blocks: int
    #: mean milliseconds a token after the first, of each round
    samples: list[float] = dataclasses.field(default_factory=list)

    @property
    def ms_per_token(self) -> float:
        return statistics.median(self.samples)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write JSON and plot where asked for."""
    sweeps = bool(arguments.sweep_context or arguments.sweep_blocks)
    if sweeps and arguments.output_len < 2:
        raise ValidationError("A sweep times the tokens after the first: --output-len is at least 2.")
    if arguments.plot and not sweeps:
        raise ValidationError("--plot draws a sweep: give --sweep-context or --sweep-blocks.")
    plot.require(arguments.plot)
    ids = ordinary_ids(bench_tokenizer(arguments))
    if not sweeps:
        report.write(arguments.output_json, arguments, _batch(arguments, ids))
        return 0
    results, found = _sweep(arguments, ids)
    report.write(arguments.output_json, arguments, results)
    if arguments.plot:
        _plot(arguments, found)
    return 0


def make_batch(arguments: argparse.Namespace, ids: list[int], input_len: int) -> list[Request]:
    """Random prompts, all of one length."""
    draw = random.Random(getattr(arguments, "seed", 0))
    return [(draw.choices(ids, k=input_len), arguments.output_len) for _ in range(arguments.batch_size)]


def _batch(arguments: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    requests = make_batch(arguments, ids, arguments.input_len)
    prompt_tokens, output_tokens = (arguments.batch_size * n for n in (arguments.input_len, arguments.output_len))
    sizes = Sizes(num_requests=arguments.batch_size, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    samples, ttfts, tpots = Samples(sizes=sizes), [], []
    # as in vLLM: a prefix that every round shares would hide the prompts' cost
    with build_llm(arguments, enable_prefix_caching=False) as llm:
        session = JaxLLMSession(llm, detokenize=not arguments.disable_detokenize)
        session.check(requests)
        for turn in range(-arguments.num_iters_warmup, arguments.num_iters):
            prefill = timed_round(session, [(prompt, 1) for prompt, _ in requests])["seconds"]
            seconds = timed_round(session, requests)["seconds"]
            if turn >= 0:
                samples.prefill_seconds.append(prefill)
                samples.seconds.append(seconds)
                ttfts += [output.metrics.first_token_latency for output in session.outputs if output.metrics]
                tpots += [output.metrics.time_per_output_token for output in session.outputs if output.metrics]
        engine = session.facts
    percentiles = {share: percentile(samples.seconds, share) for share in PERCENTAGES}
    print(f"Avg latency: {statistics.fmean(samples.seconds)} seconds")
    for share, seconds in percentiles.items():
        print(f"{share}% percentile latency: {seconds} seconds")
    latencies = {"ttft_s": summary(ttfts)}
    if arguments.output_len > 1:
        latencies["tpot_s"] = summary(tpots)
    for name, numbers in latencies.items():
        shown = ", ".join(f"{key} {numbers[key] * 1000:.2f}" for key in ("mean", "median", "p99"))
        print(f"{name.removesuffix('_s').upper()} (ms): {shown}")
    return {
        "engine": engine,
        "avg_latency": statistics.fmean(samples.seconds),
        "latencies": samples.seconds,
        "percentiles": percentiles,
        **latencies,
        "ttfts_s": ttfts,
        "tpots_s": tpots,
        "rates": samples.record(),
    }


def _sweep(arguments: argparse.Namespace, ids: list[int]) -> tuple[dict[str, Any], list[Decoding]]:
    contexts = arguments.sweep_context or [arguments.input_len]
    found: list[Decoding] = []
    for blocks in arguments.sweep_blocks or [None]:
        # with the prompts in the cache every round is almost nothing but decoding
        longest = max(contexts) + arguments.output_len
        if blocks is not None:
            arguments.num_gpu_blocks_override = blocks
        with build_llm(arguments, enable_prefix_caching=True, max_model_len=longest) as llm:
            session = JaxLLMSession(llm, detokenize=not arguments.disable_detokenize)
            for context in contexts:
                decoding = Decoding(context=context, num_blocks=llm.memory_plan.num_blocks)
                requests = make_batch(arguments, ids, context)
                for turn in range(-max(arguments.num_iters_warmup, 1), arguments.num_iters):
                    session.generate(requests)
                    seconds = [o.metrics.time_per_output_token for o in session.outputs if o.metrics]
                    if turn >= 0:
                        decoding.samples.append(statistics.fmean(seconds) * 1000)
                found.append(decoding)
                print(
                    f"context {context:>7}, {decoding.num_blocks:>7} blocks: {decoding.ms_per_token:.3f} ms per token",
                    flush=True,
                )
            engine = session.facts
    decodings = [{**dataclasses.asdict(decoding), "ms_per_token": decoding.ms_per_token} for decoding in found]
    return {"engine": engine, "batch_size": arguments.batch_size, "sweep": decodings}, found


def _plot(arguments: argparse.Namespace, found: list[Decoding]) -> None:
    lines: dict[str, plot.Points] = {}
    by_context = bool(arguments.sweep_context)
    for decoding in found:
        name = f"{decoding.num_blocks} blocks" if by_context else f"context {decoding.context}"
        place = decoding.context if by_context else decoding.num_blocks
        lines.setdefault(name, []).append((place, decoding.ms_per_token))
    x = "tokens of context" if by_context else "blocks of the KV cache"
    plot.draw(arguments.plot, lines, x=x, y=f"ms per token, {arguments.batch_size} sequences")

"""``jaxllm bench latency`` times one batch of equal requests, or decoding by context and cache size."""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench import plot, report
from jaxllm.bench.datasets import bench_ids
from jaxllm.bench.measurements import Samples, percentiles, summary, turns
from jaxllm.bench.peers.protocol import Request, timed_round
from jaxllm.bench.session import JaxLLMSession
from jaxllm.command_options import build_llm


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write JSON and plot where asked for."""
    sweeps = bool(arguments.sweep_context or arguments.sweep_blocks)
    if sweeps and arguments.output_len < 2:
        raise ValidationError("A sweep times the tokens after the first: --output-len is at least 2.")
    if arguments.plot and not sweeps:
        raise ValidationError("--plot draws a sweep: give --sweep-context or --sweep-blocks.")
    plot.require(arguments.plot)
    ids = bench_ids(arguments)
    results = (_sweep if sweeps else _batch)(arguments, ids)
    report.write(arguments.output_json, arguments, results)
    if arguments.plot:
        _plot(arguments, results["sweep"])
    return 0


def make_batch(arguments: argparse.Namespace, ids: list[int], batch_size: int, input_len: int) -> list[Request]:
    """Return random prompts, all of one length."""
    draw = random.Random(getattr(arguments, "seed", 0))
    return [(draw.choices(ids, k=input_len), arguments.output_len) for _ in range(batch_size)]


def _batch(arguments: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    count = arguments.batch_size
    requests = make_batch(arguments, ids, count, arguments.input_len)
    samples = Samples(
        num_requests=count, prompt_tokens=count * arguments.input_len, output_tokens=count * arguments.output_len
    )
    ttfts, tpots = [], []
    # as in vLLM: a prefix that every round shares would hide the prompts' cost
    with build_llm(arguments, enable_prefix_caching=False) as llm:
        session = JaxLLMSession(llm, detokenize=not arguments.disable_detokenize)
        session.check(requests)
        for turn in turns(arguments):
            prefill = timed_round(session, [(prompt, 1) for prompt, _ in requests])["seconds"]
            samples.add(turn, timed_round(session, requests)["seconds"], prefill)
            if turn >= 0:
                ttfts += [output.metrics.first_token_latency for output in session.outputs if output.metrics]
                tpots += session.times_per_token()
        drafts = session.drafts()
    average, shares = statistics.fmean(samples.seconds), percentiles(samples.seconds)
    print(f"Avg latency: {average} seconds")
    for share, seconds in shares.items():
        print(f"{share}% percentile latency: {seconds} seconds")
    latencies = {"ttft_s": summary(ttfts), **({"tpot_s": summary(tpots)} if arguments.output_len > 1 else {})}
    for name, numbers in latencies.items():
        shown = ", ".join(f"{key} {numbers[key] * 1000:.2f}" for key in ("mean", "median", "p99"))
        print(f"{name.removesuffix('_s').upper()} (ms): {shown}")
    report.show_drafts(drafts)
    return {
        "engine": session.facts,
        "drafts": drafts,
        "avg_latency": average,
        "latencies": samples.seconds,
        "percentiles": shares,
        **latencies,
        "ttfts_s": ttfts,
        "tpots_s": tpots,
        "rates": samples.record(),
    }


def _sweep(arguments: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    """Time decoding at each context and cache size: mean milliseconds a token after the first, of each round."""
    contexts = arguments.sweep_context or [arguments.input_len]
    found: list[dict[str, Any]] = []
    session = None
    for blocks in arguments.sweep_blocks or [None]:
        if blocks is not None:
            arguments.num_gpu_blocks_override = blocks
        longest = max(contexts) + arguments.output_len
        # with the prompts in the cache every round is almost nothing but decoding
        with build_llm(arguments, enable_prefix_caching=True, max_model_len=longest) as llm:
            session = JaxLLMSession(llm, detokenize=not arguments.disable_detokenize)
            for context in contexts:
                requests, times = make_batch(arguments, ids, arguments.batch_size, context), []
                # the first round fills the cache
                for turn in range(-max(arguments.num_iters_warmup, 1), arguments.num_iters):
                    session.generate(requests)
                    times += [1000 * statistics.fmean(session.times_per_token())] if turn >= 0 else []
                ms, num_blocks = statistics.median(times), llm.memory_plan.num_blocks
                print(f"context {context:>7}, {num_blocks:>7} blocks: {ms:.3f} ms per token", flush=True)
                found.append({"context": context, "num_blocks": num_blocks, "samples": times, "ms_per_token": ms})
    assert session is not None
    return {"engine": session.facts, "batch_size": arguments.batch_size, "sweep": found}


def _plot(arguments: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    lines: dict[str, plot.Points] = {}
    by_context = bool(arguments.sweep_context)
    for decoding in found:
        name = f"{decoding['num_blocks']} blocks" if by_context else f"context {decoding['context']}"
        place = decoding["context"] if by_context else decoding["num_blocks"]
        lines.setdefault(name, []).append((place, decoding["ms_per_token"]))
    x = "tokens of context" if by_context else "blocks of the KV cache"
    plot.draw(arguments.plot, lines, x=x, y=f"ms per token, {arguments.batch_size} sequences")

"""``jaxllm bench serve-trace`` times requests that come one by one; `AsyncLLM` answers them in this process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.async_llm import AsyncLLM
from jaxllm.bench import report
from jaxllm.bench.datasets import BenchRequest, arrivals, bench_tokenizer, model_vocabulary, read_dataset
from jaxllm.bench.measurements import summary
from jaxllm.command_options import engine_arguments

#: vLLM's `bench serve`: its key, its short name, its heading
METRICS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)
#: of `serve_results.peaks`
_PEAKS = {
    "Peak output token throughput (tok/s)": "max_output_tokens_per_s",
    "Peak concurrent requests": "max_concurrent_requests",
}


@dataclasses.dataclass(kw_only=True)
class Answer:
    """When the tokens of one request came, in seconds of one clock."""

    prompt_tokens: int
    sent: float
    #: of each output with new tokens
    times: list[float] = dataclasses.field(default_factory=list)
    output_tokens: int = 0
    #: why there is no answer; None: there is
    error: str | None = None


def run(arguments: argparse.Namespace) -> int:
    """Replay, print vLLM's lines, write JSON. Raises `JaxLLMError` when every request failed."""
    if not (arguments.request_rate > 0 and 0 < arguments.burstiness < math.inf):
        raise ValidationError("--request-rate and --burstiness are above 0, and --burstiness is finite.")
    requests = read_dataset(arguments, bench_tokenizer(arguments), model_vocabulary(arguments))
    offsets = arrivals(arguments, requests)
    answers, seconds = asyncio.run(_replay(arguments, requests, offsets))
    failed = [answer.error for answer in answers if answer.error is not None]
    if len(failed) == len(answers):
        raise JaxLLMError(f"all {len(answers)} requests failed, the first one: {failed[0]}")
    results = measure(answers, seconds)
    print(table(results, arguments))
    report.write(arguments.output_json, arguments, {**results, "answers": [dataclasses.asdict(a) for a in answers]})
    return 0


def measure(
    answers: list[Answer],
    seconds: float,
    *,
    percentages: Sequence[float] = (99,),
    goals: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return vLLM's metrics, in milliseconds. A request with more than one token has a TPOT, a pair of outputs an ITL.

    Args:
        seconds: from the first request to the last token.
        percentages: of the percentiles.
        goals: metric -> the longest milliseconds of a request that counts as goodput.
    """
    good = [answer for answer in answers if answer.error is None]
    values = {
        "ttft": [a.times[0] - a.sent for a in good],
        "tpot": [(a.times[-1] - a.times[0]) / (a.output_tokens - 1) for a in good if a.output_tokens > 1],
        "itl": [after - before for a in good for before, after in itertools.pairwise(a.times)],
        "e2el": [a.times[-1] - a.sent for a in good],
    }
    outputs, inputs = sum(a.output_tokens for a in good), sum(a.prompt_tokens for a in good)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
    }
    for key, _, _ in METRICS:
        for name, value in summary([seconds * 1000 for seconds in values[key]]).items():
            found[f"{name}_{key}_ms"] = value
        for share in percentages:
            found[f"p{share}_{key}_ms"] = float(np.percentile(values[key] or [0.0], share)) * 1000
    if goals:
        found["request_goodput"] = sum(_is_good(answer, goals) for answer in good) / seconds
    return found


def _is_good(answer: Answer, goals: Mapping[str, float]) -> bool:
    """Whether a request was as fast as all goals have it; DistServe (arXiv:2401.09670) calls their rate goodput."""
    first, last = answer.times[0] - answer.sent, answer.times[-1] - answer.sent
    found = {"ttft": first, "e2el": last, "tpot": (last - first) / max(answer.output_tokens - 1, 1)}
    return all(found[name] * 1000 <= limit for name, limit in goals.items())


def table(
    results: dict[str, Any],
    arguments: argparse.Namespace,
    *,
    metrics: Sequence[str] | None = None,
    percentages: Sequence[float] = (99,),
) -> str:
    """Return the results as ``vllm bench serve`` prints them.

    Args:
        metrics: keys of those that are shown; None: all.
        percentages: as `measure` was given them.
    """
    shown = {"Successful requests": results["completed"], "Failed requests": results["failed"]}
    if arguments.max_concurrency is not None:
        shown["Maximum request concurrency"] = arguments.max_concurrency
    if math.isfinite(arguments.request_rate):
        shown["Request rate configured (RPS)"] = float(arguments.request_rate)
    shown |= {
        "Benchmark duration (s)": results["duration"],
        "Total input tokens": results["total_input_tokens"],
        "Total generated tokens": results["total_output_tokens"],
        "Request throughput (req/s)": results["request_throughput"],
        **({"Request goodput (req/s)": results["request_goodput"]} if "request_goodput" in results else {}),
        "Output token throughput (tok/s)": results["output_throughput"],
        **{label: results[key] for label, key in _PEAKS.items() if key in results},
        "Total token throughput (tok/s)": results["total_token_throughput"],
    }
    lines = [f"{' Serving Benchmark Result ':=^50}", *map(_line, shown, shown.values())]
    for key, short, heading in METRICS:
        if metrics is not None and key not in metrics:
            continue
        lines.append(f"{heading:-^50}")
        names = ("mean", "median", *(f"p{share}" for share in percentages))
        lines += [_line(f"{name.capitalize()} {short} (ms)", results[f"{name}_{key}_ms"]) for name in names]
    return "\n".join([*lines, "=" * 50])


def _line(label: str, value: float) -> str:
    return f"{label + ':':<40} {f'{value:.2f}' if isinstance(value, float) else value:<10}"


async def _replay(
    arguments: argparse.Namespace, requests: list[BenchRequest], offsets: list[float]
) -> tuple[list[Answer], float]:
    model, given = engine_arguments(arguments)
    limit = asyncio.Semaphore(arguments.max_concurrency) if arguments.max_concurrency else contextlib.nullcontext()
    detokenize = not arguments.disable_detokenize
    async with await AsyncLLM.start(model, **given) as llm:
        await llm.wait_until_ready()
        # the first request of an engine's life pays for what the others do not
        await _answer(llm, dataclasses.replace(requests[0], output_len=1), detokenize)
        await llm.reset_prefix_cache()
        began = time.perf_counter()

        async def one(request: BenchRequest, offset: float) -> Answer:
            await asyncio.sleep(began + offset - time.perf_counter())
            async with limit:
                return await _answer(llm, request, detokenize)

        answers = await asyncio.gather(*map(one, requests, offsets))
        return answers, time.perf_counter() - began


async def _answer(llm: AsyncLLM, request: BenchRequest, detokenize: bool) -> Answer:
    params = SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        max_tokens=request.output_len,
        detokenize=detokenize,
        output_kind=RequestOutputKind.DELTA,
    )
    prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
    answer = Answer(prompt_tokens=len(request.prompt_token_ids), sent=time.perf_counter())
    try:
        async for output in llm.generate(prompt, params):
            if output.outputs[0].token_ids:
                answer.times.append(time.perf_counter())
                answer.output_tokens += len(output.outputs[0].token_ids)
    except (ValidationError, RuntimeError) as error:
        answer.error = str(error)
    else:
        if answer.output_tokens < request.output_len:
            answer.error = (
                f"{answer.output_tokens} of {request.output_len} tokens came: behind a prompt of "
                f"{answer.prompt_tokens} there is no room for more. Give a larger --max-model-len."
            )
    return answer

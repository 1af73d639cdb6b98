"""``jaxllm bench serve`` times a server of OpenAI's API, as ``vllm bench serve`` does: with its options and lines."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.bench import plot, report, serve_results
from jaxllm.bench.datasets import BenchRequest, arrivals, bench_tokenizer, model_vocabulary, read_dataset
from jaxllm.bench.http_stream import lines
from jaxllm.bench.serve_trace import METRICS, Answer, measure, table
from jaxllm.command_options import engine_arguments

#: of every request, where they are given
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A server, and how it is asked."""

    url: str
    model: str
    headers: Mapping[str, str]
    #: of every body
    extra: Mapping[str, Any]
    chat: bool


def run(arguments: argparse.Namespace) -> int:
    """Ask, print vLLM's lines, write JSON. Raises `JaxLLMError` when every request failed."""
    if not (arguments.request_rate > 0 and 0 < arguments.burstiness < math.inf):
        raise ValidationError("--request-rate and --burstiness are above 0, and --burstiness is finite.")
    goals = _goals(arguments.goodput)
    metrics = _metrics(arguments.percentile_metrics)
    serve_results.metadata(arguments.metadata)
    saved = serve_results.result_path(arguments)
    timelines = _timelines(arguments, saved)
    tokenizer = bench_tokenizer(arguments)
    # with a tokenizer of its own, the model may be a mere name here
    has_model = engine_arguments(arguments)[1].get("tokenizer") is None
    requests = read_dataset(arguments, tokenizer, model_vocabulary(arguments) if has_model else None)
    texts = None
    if _is_chat(arguments):
        texts = [str(tokenizer.decode(list(request.prompt_token_ids))) for request in requests]
    answers, seconds = asyncio.run(_ask(arguments, requests, texts))
    failed = [answer.error for answer in answers if answer.error is not None]
    if len(failed) == len(answers):
        raise JaxLLMError(f"all {len(answers)} requests failed, the first one: {failed[0]}")
    results = measure(answers, seconds, percentages=arguments.metric_percentiles, goals=goals)
    results |= serve_results.peaks(answers)
    print(table(results, arguments, metrics=metrics, percentages=arguments.metric_percentiles))
    report.write(arguments.output_json, arguments, {**results, "answers": [dataclasses.asdict(a) for a in answers]})
    serve_results.save(saved, arguments, results, answers)
    for path in timelines:
        plot.draw_timeline(path, [(answer.sent, *answer.times) for answer in answers if answer.error is None])
    return 0


def _timelines(arguments: argparse.Namespace, saved: Path | None) -> list[Path]:
    """Return the pictures to draw: that of ``--plot``, and one beside the saved result."""
    paths = [arguments.plot] if arguments.plot is not None else []
    if arguments.plot_timeline and saved is not None:
        paths.append(saved.with_suffix(".timeline.png"))
    for path in paths:
        plot.require(path)
    return paths


def _is_chat(arguments: argparse.Namespace) -> bool:
    return arguments.backend == "openai-chat"


def _goals(given: list[str]) -> dict[str, float]:
    """Return the longest milliseconds of each metric, of which goodput speaks."""
    known = ("ttft", "tpot", "e2el")
    goals = {}
    for word in given:
        name, colon, value = word.partition(":")
        try:
            goals[name] = float(value)
        except ValueError:
            colon = ""
        if not colon or name not in known or not goals[name] > 0:
            raise ValidationError(
                f"--goodput {word!r} is not NAME:MILLISECONDS, such as ttft:200, with one of {', '.join(known)}."
            )
    return goals


def _metrics(text: str) -> list[str]:
    names, known = text.split(","), [key for key, _, _ in METRICS]
    for name in names:
        if name not in known:
            raise ValidationError(f"--percentile-metrics has {name!r}; there are {', '.join(known)}.")
    return names


async def _ask(
    arguments: argparse.Namespace, requests: list[BenchRequest], texts: list[str] | None
) -> tuple[list[Answer], float]:
    target = await _target(arguments)
    prompts: list[Any] = texts or [list(request.prompt_token_ids) for request in requests]
    for _ in range(arguments.num_warmups):
        warm = await _answer(target, requests[0], prompts[0])
        if warm.error is not None:
            raise JaxLLMError(f"the first request failed: {warm.error}")
    limit = asyncio.Semaphore(arguments.max_concurrency) if arguments.max_concurrency else contextlib.nullcontext()
    offsets = arrivals(arguments, requests)
    began = time.perf_counter()

    async def one(request: BenchRequest, prompt: Any, offset: float) -> Answer:
        await asyncio.sleep(began + offset - time.perf_counter())
        async with limit:
            return await _answer(target, request, prompt)

    answers = await asyncio.gather(*map(one, requests, prompts, offsets))
    return answers, time.perf_counter() - began


async def _target(arguments: argparse.Namespace) -> Target:
    base = (arguments.base_url or f"http://{arguments.host}:{arguments.port}").rstrip("/")
    key = os.environ.get("OPENAI_API_KEY")
    headers = ({"Authorization": f"Bearer {key}"} if key else {}) | _headers(arguments.header)
    model = arguments.served_model_name
    if model is None:
        # whatever the server has
        told = json.loads(b"".join([line async for line in lines(f"{base}/v1/models", headers=headers)]))
        model = told["data"][0]["id"]
    url = base + (arguments.endpoint or ENDPOINTS[arguments.backend])
    given = {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}
    extra = {**given, **(arguments.extra_body or {})}
    return Target(url=url, model=model, headers=headers, extra=extra, chat=_is_chat(arguments))


def _headers(words: Sequence[str]) -> dict[str, str]:
    headers = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not name or not sign or not word.isprintable():
            raise ValidationError(f"--header {word!r} is not NAME=VALUE, such as X-Tenant=test.")
        headers[name] = value
    return headers


async def _answer(target: Target, request: BenchRequest, prompt: Any) -> Answer:
    """Ask for one answer, and note when its pieces came."""
    body: dict[str, Any] = {"model": target.model, "max_tokens": request.output_len, "temperature": 0.0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"messages": [{"role": "user", "content": prompt}]} if target.chat else {"prompt": prompt}
    answer = Answer(prompt_tokens=len(request.prompt_token_ids), sent=time.perf_counter())
    try:
        async with contextlib.aclosing(lines(target.url, {**body, **target.extra}, target.headers)) as answered:
            async for line in answered:
                if line.startswith(b"data:") and not line.endswith(b"[DONE]"):
                    _note(answer, json.loads(line[5:]))
    except (JaxLLMError, ValueError) as error:
        answer.error = str(error)
    else:
        if answer.error is None and not answer.times:
            answer.error = "no token came"
    return answer


def _note(answer: Answer, piece: Mapping[str, Any]) -> None:
    if "error" in piece:
        answer.error = str(piece["error"].get("message", piece["error"]))
    usage, choices = piece.get("usage"), piece.get("choices") or []
    delta = choices[0].get("delta") if choices else None
    # the first piece of a chat says who speaks, and no token
    if choices and (delta is None or any(value for name, value in delta.items() if name != "role")):
        answer.times.append(time.perf_counter())
        answer.output_tokens += 1
    if usage and not choices:
        answer.output_tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]

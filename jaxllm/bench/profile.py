"""``jaxllm bench profile`` says where the milliseconds of the compiled steps go, on a CPU."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.bench import op_times, report
from jaxllm.bench.datasets import bench_ids
from jaxllm.bench.latency import make_batch
from jaxllm.bench.session import JaxLLMSession
from jaxllm.command_options import build_llm
from jaxllm.llm import LLM


def run(arguments: argparse.Namespace) -> int:
    """Run a batch under JAX's profiler, print a table of each program, write the JSON file."""
    ids = bench_ids(arguments)
    results = []
    with build_llm(arguments, enable_prefix_caching=False) as llm:
        if any(device.platform != "cpu" for device in _programs(llm).sharding.device_set):
            raise ValidationError("bench profile reads a CPU's profiles; on a GPU, llm.start_profile() writes one.")
        session = JaxLLMSession(llm, detokenize=True)
        largest, most = max(arguments.batch_sizes), session.facts["max_num_seqs"]
        if largest > most:
            raise ValidationError(
                f"--batch-sizes: {largest} requests do not run at once, max_num_seqs is {most}: give a larger "
                "--max-num-seqs."
            )
        for batch_size in arguments.batch_sizes:
            requests = make_batch(arguments, ids, batch_size, arguments.input_len)
            session.check(requests)
            session.generate(requests)
            session.generate(requests)
            plain = _ms_per_token(session)
            programs = profiled(llm, lambda: session.generate(requests))  # noqa: B023
            under = _ms_per_token(session)
            speed = "no token after the first"
            if plain is not None:
                speed = f"{plain:.1f} ms a token after the first, {under:.1f} under the profiler"
            print(f"{batch_size} requests, {arguments.input_len} tokens in, {arguments.output_len} out: {speed}")
            found = {"batch_size": batch_size, "ms_per_token": plain, "profiled_ms_per_token": under, "programs": []}
            for program, launches in programs.items():
                found["programs"].append(_shown(program, launches))
            results.append(found)
    report.write(arguments.output_json, arguments, {"engine": session.facts, "batches": results})
    return 0


def _ms_per_token(session: JaxLLMSession) -> float | None:
    """Return mean milliseconds of a token after the first; None: there are none."""
    times = session.times_per_token()
    return 1000 * statistics.fmean(times) if any(times) else None


def _programs(llm: LLM) -> Any:
    return llm.engine.runner.head.programs  # pyright: ignore[reportAttributeAccessIssue]


def profiled(llm: LLM, work: Callable[[], Any]) -> dict[str, list[op_times.Launch]]:
    """Return the launches of each program while `work` is done; the programs in the order of their time."""
    programs = _programs(llm)
    asked: list[Any] = []
    get = programs._get

    def noted(key: Any) -> Any:
        asked.append(key)
        return get(key)

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="jaxllm-profile-") as folder:
        programs._get = noted
        try:
            with jax.profiler.trace(folder, profiler_options=options):
                work()
        finally:
            del programs._get
        runs = op_times.runs(Path(folder))
    if len(runs) != len(asked):
        raise ValidationError(f"The profile has {len(runs)} of {len(asked)} launches: give a smaller --output-len.")
    texts = {key: op_times.ProgramText(get(key).as_text()) for key in dict.fromkeys(asked)}
    found: dict[str, list[op_times.Launch]] = {}
    for key, each in zip(asked, runs, strict=True):
        found.setdefault(_name(key), []).append(op_times.launch(each, texts[key]))
    return dict(sorted(found.items(), key=lambda item: -sum(each.seconds for each in item[1])))


def _name(key: Any) -> str:
    kind, *rest = key
    if kind == "forward":
        (bucket,) = rest
        return f"forward, {bucket.tokens} tokens of {bucket.seqs} sequences"
    if kind == "decode steps":
        return f"several decode steps of {rest[0].seqs} sequences, head and sampling with them"
    if kind == "sample":
        return f"head and sampling, {rest[0]} rows at a time"
    return ", ".join(map(str, key))


def _shown(program: str, launches: list[op_times.Launch]) -> dict[str, Any]:
    """Print a program and its parts; returns them, for JSON."""
    mean, parts = statistics.fmean(each.seconds for each in launches), op_times.mean_parts(launches)
    print(f"  {program}: {len(launches)} launches of {1000 * mean:.2f} ms")
    for part, seconds in parts.items():
        if seconds >= mean / 1000:
            print(f"    {part:36} {1000 * seconds:8.2f} {seconds / mean:6.1%}", flush=True)
    return {"program": program, "launches": len(launches), "mean_s": mean, "parts_s": parts}

"""``jaxllm bench profile``: where the milliseconds of the compiled steps go, on a CPU."""

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
from jaxllm.bench.datasets import ordinary_ids
from jaxllm.bench.latency import make_batch
from jaxllm.bench.session import JaxLLMSession
from jaxllm.bench.tokenizers import bench_tokenizer
from jaxllm.command_options import build_llm
from jaxllm.llm import LLM


def run(arguments: argparse.Namespace) -> int:
    """Run a batch under JAX's profiler, print a table of each program, write the JSON file."""
    ids = ordinary_ids(bench_tokenizer(arguments))
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
            case = argparse.Namespace(**{**vars(arguments), "batch_size": batch_size})
            requests = make_batch(case, ids, arguments.input_len)
            session.check(requests)
            session.generate(requests)
            session.generate(requests)
            plain = _ms_per_token(session)
            programs = profiled(llm, lambda: session.generate(requests))  # noqa: B023
            found = {"batch_size": batch_size, "ms_per_token": plain, "profiled_ms_per_token": _ms_per_token(session)}
            print(
                f"{batch_size} requests, {arguments.input_len} tokens in, {arguments.output_len} out: {_speed(found)}"
            )
            print("\n".join(table(programs)), flush=True)
            results.append({**found, "programs": [_record(key, launches) for key, launches in programs.items()]})
        facts = session.facts
    report.write(arguments.output_json, arguments, {"engine": facts, "batches": results})
    return 0


def _ms_per_token(session: JaxLLMSession) -> float | None:
    """Mean milliseconds of a token after the first; None: there are none."""
    times = [output.metrics.time_per_output_token for output in session.outputs if output.metrics]
    return 1000 * statistics.fmean(times) if any(times) else None


def _speed(found: dict[str, Any]) -> str:
    plain, under = found["ms_per_token"], found["profiled_ms_per_token"]
    if plain is None:
        return "no token after the first"
    return f"{plain:.1f} ms a token after the first, {under:.1f} under the profiler"


def _programs(llm: LLM) -> Any:
    return llm.engine.core._runner._programs  # pyright: ignore[reportAttributeAccessIssue]


def profiled(llm: LLM, work: Callable[[], Any]) -> dict[str, list[op_times.Launch]]:
    """The launches of each program while `work` is done; the programs in the order of their time."""
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


def table(programs: dict[str, list[op_times.Launch]]) -> list[str]:
    """Lines: each program, and under it its parts."""
    lines = []
    for name, launches in programs.items():
        mean = statistics.fmean(each.seconds for each in launches)
        lines.append(f"  {name}: {len(launches)} launches of {1000 * mean:.2f} ms")
        lines += [
            f"    {part:36} {1000 * seconds:8.2f} {seconds / mean:6.1%}"
            for part, seconds in op_times.mean_parts(launches).items()
            if seconds >= mean / 1000
        ]
    return lines


def _record(name: str, launches: list[op_times.Launch]) -> dict[str, Any]:
    return {
        "program": name,
        "launches": len(launches),
        "mean_s": statistics.fmean(each.seconds for each in launches),
        "parts_s": op_times.mean_parts(launches),
    }

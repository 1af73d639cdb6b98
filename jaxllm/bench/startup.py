"""``jaxllm bench startup`` times starts up to the first token, with an empty compile cache and with a full one."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench import report
from jaxllm.bench.engine_process import answer_of
from jaxllm.bench.measurements import percentiles
from jaxllm.command_options import engine_arguments
from jaxllm.config.cache_folder import cache_folder


def run(arguments: argparse.Namespace) -> int:
    """Start engines, each in a process of its own; print vLLM's lines and the phases, write JSON."""
    if not arguments.num_iters_cold + arguments.num_iters_warm:
        raise ValidationError("--num-iters-cold and --num-iters-warm are both 0: there is nothing to measure.")
    model, given = engine_arguments(arguments)
    longest = given.get("max_model_len")
    if isinstance(longest, int) and 0 < longest <= arguments.input_len:
        raise ValidationError(
            f"--input-len {arguments.input_len} leaves no room for a token within --max-model-len {longest}: give a "
            "shorter one."
        )
    job = {"model": os.fspath(model), "engine_args": given, "input_len": arguments.input_len}
    cold = [_cold_start(job) for _ in range(arguments.num_iters_cold)]
    num_warm_up = arguments.num_iters_warmup if arguments.num_iters_warm else 0
    warm = [start_once(job, dict(os.environ)) for _ in range(num_warm_up + arguments.num_iters_warm)][num_warm_up:]
    print("=" * 60, "STARTUP TIME BENCHMARK RESULTS", "=" * 60, sep="\n")
    results: dict[str, Any] = {}
    for name, starts in (("cold", cold), ("warm", warm)):
        if starts:
            print(f"\n{name.upper()} STARTUP:")
            results[name] = _summary(starts)
            _show(results[name])
    if not num_warm_up and any(start["compiler"].get("trace s", 0.0) > 0 for start in warm):
        print(
            "Among the warm starts are some that had to trace or compile: pass --num-iters-warmup 1 or more, to have "
            "the compile cache filled before."
        )
    print("=" * 60)
    # not this process's, which holds no engine
    results["peak_rss_bytes"] = max(found["peak_rss_bytes"] for found in results.values())
    report.write(arguments.output_json, arguments, results)
    return 0


def start_once(job: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    """Start an engine in a new process and generate one token; returns what `first_token` prints.

    Raises `JaxLLMError` when the process fails; the text has its last words.
    """
    command = [sys.executable, "-m", "jaxllm.bench.first_token"]
    return answer_of("the engine did not start", command, {**job, "started_at": time.time()}, env)


def _cold_start(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="jaxllm-cold-") as folder:
        # the models stay: fetching them is no part of starting
        if (cache_folder() / "models").is_dir():
            (Path(folder) / "models").symlink_to(cache_folder() / "models")
        env = {**os.environ, "JAXLLM_CACHE": folder}
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        return start_once(job, env)


def _summary(starts: list[dict[str, Any]]) -> dict[str, Any]:
    totals = [start["seconds"] for start in starts]
    phases = [start["phases"] for start in starts]
    return {
        "avg_startup_time": statistics.fmean(totals),
        "startup_times": totals,
        "startup_percentiles": percentiles(totals),
        "ready_seconds": [start["ready_seconds"] for start in starts if "ready_seconds" in start],
        "median_phases": {name: statistics.median(each.get(name, 0.0) for each in phases) for name in phases[0]},
        "peak_rss_bytes": max(start["peak_rss_bytes"] for start in starts),
        "planned_bytes": starts[0].get("planned_bytes"),
        "starts": starts,
    }


def _show(summary: dict[str, Any]) -> None:
    print(f"Avg startup time: {summary['avg_startup_time']:.2f} seconds")
    print("Startup time percentiles:")
    for share, seconds in summary["startup_percentiles"].items():
        print(f"  {share}%: {seconds:.2f} seconds")
    print("Phases, medians:")
    for name, seconds in summary["median_phases"].items():
        print(f"  {name:<20} {seconds:7.2f} seconds")
    if summary["ready_seconds"]:
        print(f"All programs there, median: {statistics.median(summary['ready_seconds']):.2f} seconds")
    compiler = summary["starts"][-1]["compiler"]
    counted = ", ".join(f"{name} {value:g}" for name, value in compiler.items())
    print(f"Within these, summed over threads, of the last start: {counted}")
    peak, planned = summary["peak_rss_bytes"], summary["planned_bytes"]
    above = f", {(peak - planned) / 1e6:.0f} MB above the planned {planned / 1e6:.0f} MB" if planned else ""
    print(f"Peak RSS, most of all starts: {peak / 1e6:.0f} MB{above}")

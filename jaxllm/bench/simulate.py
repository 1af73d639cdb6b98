"""``jaxllm bench simulate`` says how far the simulator is from what is measured."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxllm.api.sampling_params import SamplingParams
from jaxllm.bench import report
from jaxllm.bench.datasets import BenchRequest, bench_ids, prefix_repetition, random_lengths
from jaxllm.command_options import build_llm
from jaxllm.engine.observe.trace import Trace
from jaxllm.llm import LLM
from jaxllm.tuning.simulation.fitted_steps import FittedSteps
from jaxllm.tuning.simulation.measure import run_steps
from jaxllm.tuning.simulation.replay import replay
from jaxllm.tuning.simulation.simulate import simulate
from jaxllm.tuning.simulation.simulated_run import SimulatedRun
from jaxllm.tuning.simulation.workload import Workload

#: what is compared, and under which name it is shown
_NUMBERS = {"throughput": "tokens/s", "ttft_p50": "TTFT"}


def run(arguments: argparse.Namespace) -> int:
    """Measure each workload with each setting, and simulate it twice: with times of steps that were measured before and
    after it, none of which is its own, and with those of the trace of the first setting.
    """
    ids = bench_ids(arguments)
    rows: list[dict[str, Any]] = []
    firsts: dict[str, Trace] = {}
    print(f"{'workload':9} {'max_num_seqs':>12} {'tokens':>7} {'measured tokens/s':>18} {'TTFT ms':>9}   errors")
    for number, seqs in enumerate(arguments.num_seqs):
        budget = arguments.num_batched_tokens[number % len(arguments.num_batched_tokens)]
        changes = {"max_num_seqs": seqs, "max_num_batched_tokens": budget}
        with build_llm(arguments, **changes) as llm:
            for name, requests in _workloads(ids, arguments.num_prompts).items():
                traces, steps = _measured(llm, requests, arguments.num_iters)
                first = firsts.setdefault(name, traces[0])
                row = {"workload": name, **changes, **_errors(traces, steps, first, changes if number else {})}
                rows.append(row)
                print(
                    f"{name:9} {seqs:12} {budget:7} {row['measured']['throughput']:18.1f} "
                    f"{1e3 * row['measured']['ttft_p50']:9.0f}   "
                    + ", ".join(
                        f"{short} {row['from steps'][long]:+.1%}"
                        + (f" (from the first setting {row['from the first'][long]:+.1%})" if number else "")
                        for long, short in _NUMBERS.items()
                    ),
                    flush=True,
                )
    report.write(arguments.output_json, arguments, {"rows": rows})
    return 0


def _workloads(ids: list[int], count: int) -> dict[str, list[BenchRequest]]:
    """Of four kinds: outputs dominate, prompts dominate, lengths of both vary, prompts begin alike."""
    draw: Callable[[], random.Random] = lambda: random.Random(0)  # noqa: E731
    return {
        "decode": random_lengths(ids, count, draw(), input_len=16, output_len=64),
        "prefill": random_lengths(ids, count, draw(), input_len=192, output_len=4),
        "mixed": random_lengths(ids, count, draw(), input_len=96, output_len=32, range_ratio=0.9),
        "prefixes": prefix_repetition(
            ids, count, draw(), num_prefixes=max(count // 8, 1), prefix_len=128, suffix_len=32, output_len=16
        ),
    }


def _measured(llm: LLM, requests: list[BenchRequest], rounds: int) -> tuple[list[Trace], dict[str, np.ndarray]]:
    """Traces of runs of the requests, each with an empty prefix cache, and the steps that were timed in turns with
    them: machines have slow minutes.
    """
    prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
    params = [SamplingParams(max_tokens=request.output_len, ignore_eos=True, temperature=0.0) for request in requests]
    steps, traces = [run_steps(llm, rounds=1).arrays()], []
    for _ in range(rounds):
        with llm.trace() as trace:
            llm.generate(prompts, params, use_tqdm=False)
        traces.append(trace)
        steps.append(run_steps(llm, rounds=1).arrays())
    return traces, {name: np.concatenate([each[name] for each in steps]) for name in steps[0]}


def _errors(traces: list[Trace], steps: dict[str, np.ndarray], first: Trace, changes: dict[str, Any]) -> dict[str, Any]:
    """Relative errors of both simulations, of what was measured on average."""
    runs = [SimulatedRun.of_trace(trace).to_dict() for trace in traces]
    truth = {name: float(np.mean([each[name] or 0.0 for each in runs])) for name in _NUMBERS}
    settings = traces[0].settings
    assert settings is not None
    found = {"from steps": simulate(Workload.of_trace(traces[0]), settings, FittedSteps.of(steps))}
    if changes:
        found["from the first"] = replay(first, changes).simulated
    numbers = {name: each.to_dict() for name, each in found.items()}
    errors = {
        name: {each: (values[each] or 0.0) / truth[each] - 1 for each in _NUMBERS} for name, values in numbers.items()
    }
    return {"measured": truth, **errors}

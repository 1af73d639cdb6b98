"""``jaxllm bench simulate`` says how far the simulator is from what is measured."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
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
#: arguments that say which part of the grid is measured
_PARTS = ("workloads", "num_seqs", "num_batched_tokens", "output_json")
_CELL = ("workload", "max_num_seqs", "max_num_batched_tokens")


def run(arguments: argparse.Namespace) -> int:
    """Measure each workload with each setting, and simulate it twice: with times of steps that were measured before and
    after it, none of which is its own, and with those of the trace of the first setting. What the file has already, of
    a run before, is kept and not measured again.
    """
    if len(arguments.num_batched_tokens) not in (1, len(arguments.num_seqs)):
        raise ValidationError(
            f"--num-batched-tokens has {len(arguments.num_batched_tokens)} values and --num-seqs "
            f"{len(arguments.num_seqs)}: give one each, or one for all."
        )
    rows = _rows_before(arguments)
    known = {tuple(row[name] for name in _CELL) for row in rows}
    workloads = _workloads(bench_ids(arguments), arguments.num_prompts)
    firsts: dict[str, Trace] = {}
    print(f"{'workload':9} {'max_num_seqs':>12} {'tokens':>7} {'measured tokens/s':>18} {'TTFT ms':>9}   errors")
    for row in rows:
        _show(row)
    for number, seqs in enumerate(arguments.num_seqs):
        budget = arguments.num_batched_tokens[number % len(arguments.num_batched_tokens)]
        changes = {"max_num_seqs": seqs, "max_num_batched_tokens": budget}
        missing = [name for name in arguments.workloads if (name, seqs, budget) not in known]
        if not missing:
            continue
        with build_llm(arguments, **changes) as llm:
            for name in missing:
                traces, steps = _measured(llm, workloads[name], arguments.num_iters)
                first = firsts.setdefault(name, traces[0])
                row = {"workload": name, **changes, **_errors(traces, steps, first, changes)}
                rows.append(row)
                _show(row)
                # a part that is finished stays, whatever ends the next one
                report.write(arguments.output_json, arguments, {"rows": rows, "summary": _summary(rows)})
    for name, short in _NUMBERS.items():
        told = _summary(rows)[name]
        print(
            f"{short}: off by {told['median']:.1%} in the median, {told['worst']:.1%} at worst; {told['within_tenth']} "
            f"of {len(rows)} within 10%, {told['within_rounds']} within 10% of the rounds that were measured, which "
            f"differ by {told['rounds']:.0%} in the median"
        )
    return 0


def _rows_before(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Those of the file.

    Raises:
        ValidationError: it is of other arguments, or of another benchmark.
    """
    path: Path | None = arguments.output_json
    if path is None or not path.exists() or not path.stat().st_size:
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows, before = found["rows"], found["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValidationError(f"{path} is not what this benchmark has written: give another --output-json.") from None
    own = report.plain_arguments(arguments)
    other = [name for name in sorted({*own, *before} - {*_PARTS}) if own.get(name) != before.get(name)]
    if other:
        raise ValidationError(
            f"{path} was measured with {other[0]}={before.get(other[0])!r}, and this is "
            f"{other[0]}={own.get(other[0])!r}: give another --output-json."
        )
    return rows


def _show(row: dict[str, Any]) -> None:
    changed = "from the first" in row
    print(
        f"{row['workload']:9} {row['max_num_seqs']:12} {row['max_num_batched_tokens']:7} "
        f"{row['measured']['throughput']:18.1f} {1e3 * row['measured']['ttft_p50']:9.0f}   "
        + ", ".join(
            f"{short} {row['from steps'][long]:+.1%} (rounds {_spread(row, long):.0%})"
            + (f" (from the first setting {row['from the first'][long]:+.1%})" if changed else "")
            for long, short in _NUMBERS.items()
        ),
        flush=True,
    )


def _spread(row: dict[str, Any], name: str) -> float:
    """How far the highest round of a run is above the lowest, as a part of it: what is foretold cannot be closer."""
    rounds = row["rounds"][name]
    return max(rounds) / max(min(rounds), 1e-9) - 1


def _is_within_rounds(row: dict[str, Any], name: str) -> bool:
    rounds, foretold = row["rounds"][name], (1 + row["from steps"][name]) * row["measured"][name]
    return 0.9 * min(rounds) <= foretold <= 1.1 * max(rounds)


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each number: how far the simulations of all rows are off, whichever way."""
    found = {}
    for name in _NUMBERS:
        errors = np.abs([row["from steps"][name] for row in rows])
        found[name] = {
            "median": float(np.median(errors)),
            "worst": float(errors.max()),
            "within_tenth": int((errors <= 0.1).sum()),
            "within_rounds": sum(_is_within_rounds(row, name) for row in rows),
            "rounds": float(np.median([_spread(row, name) for row in rows])),
        }
    return found


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
    """Relative errors of both simulations, of the median of what was measured: machines have slow minutes."""
    runs = [SimulatedRun.of_trace(trace).to_dict() for trace in traces]
    truth = {name: float(np.median([each[name] or 0.0 for each in runs])) for name in _NUMBERS}
    settings = traces[0].settings
    assert settings is not None
    found = {"from steps": simulate(Workload.of_trace(traces[0]), settings, FittedSteps.of(steps))}
    if first is not traces[0]:
        found["from the first"] = replay(first, changes).simulated
    numbers = {name: each.to_dict() for name, each in found.items()}
    errors = {
        name: {each: (values[each] or 0.0) / truth[each] - 1 for each in _NUMBERS} for name, values in numbers.items()
    }
    rounds = {name: [each[name] for each in runs] for name in _NUMBERS}
    return {"measured": truth, "rounds": rounds, **errors}

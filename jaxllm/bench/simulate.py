"""``jaxllm bench simulate`` says how far the simulator is from what is measured."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

from jaxllm.api.sampling_params import SamplingParams
from jaxllm.bench import report
from jaxllm.bench.datasets import BenchRequest, bench_tokenizer, ordinary_ids, prefix_repetition, random_lengths
from jaxllm.command_options import build_llm
from jaxllm.engine.observe.trace import Trace
from jaxllm.llm import LLM
from jaxllm.tuning.simulation.replay import Replay, replay
from jaxllm.tuning.simulation.simulated_run import SimulatedRun

#: what is compared, and under which name it is shown
_NUMBERS = {"throughput": "tokens/s", "ttft_p50": "TTFT"}


def run(arguments: argparse.Namespace) -> int:
    """Trace each workload with each setting; simulate it from its own trace, and from that of the first setting."""
    ids = ordinary_ids(bench_tokenizer(arguments))
    rows: list[dict[str, Any]] = []
    firsts: dict[str, Trace] = {}
    print(f"{'workload':9} {'max_num_seqs':>12} {'tokens':>7} {'measured tokens/s':>18} {'TTFT ms':>9}   errors")
    for number, seqs in enumerate(arguments.num_seqs):
        budget = arguments.num_batched_tokens[number % len(arguments.num_batched_tokens)]
        changes = {"max_num_seqs": seqs, "max_num_batched_tokens": budget}
        with build_llm(arguments, **changes) as llm:
            for name, requests in _workloads(ids, arguments.num_prompts).items():
                trace = _traced(llm, requests)
                first = firsts.setdefault(name, trace)
                own, foreseen = replay(trace, {}), replay(first, changes)
                rows.append({"workload": name, **changes, **_errors(trace, own, foreseen)})
                row = rows[-1]
                print(
                    f"{name:9} {seqs:12} {budget:7} {row['measured']['throughput']:18.1f} "
                    f"{1e3 * row['measured']['ttft_p50']:9.0f}   "
                    + ", ".join(
                        f"{short} {row['own'][long]:+.1%} (from the first setting {row['foreseen'][long]:+.1%})"
                        for long, short in _NUMBERS.items()
                    )
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


def _traced(llm: LLM, requests: list[BenchRequest]) -> Trace:
    """The second of two runs of the requests, each with an empty prefix cache."""
    prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
    params = [SamplingParams(max_tokens=request.output_len, ignore_eos=True, temperature=0.0) for request in requests]
    trace = llm.trace()
    for _ in range(2):
        llm.reset_prefix_cache()
        with trace:
            llm.generate(prompts, params, use_tqdm=False)
    return trace


def _errors(trace: Trace, own: Replay, foreseen: Replay) -> dict[str, Any]:
    truth = SimulatedRun.of_trace(trace).to_dict()
    assert foreseen.changed is not None
    found = {"own": own.same.to_dict(), "foreseen": foreseen.changed.to_dict()}
    errors = {name: {each: numbers[each] / truth[each] - 1 for each in _NUMBERS} for name, numbers in found.items()}
    return {"measured": {name: truth[name] for name in _NUMBERS}, **errors}

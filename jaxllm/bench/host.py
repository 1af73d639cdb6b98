"""``jaxllm bench host`` says what a step costs the host, part by part, by the number of running sequences."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.bench import report, vllm_scheduler
from jaxllm.bench.host_times import PARTS, Cycle, HostTimes, summary
from jaxllm.bench.host_workload import HostWorkload
from jaxllm.bench.measurements import ranks
from jaxllm.bench.peer_setup import pythons
from jaxllm.llm import LLM

if TYPE_CHECKING:
    from jaxllm.engine.step import StepFuture

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.thread_time, "wall": time.perf_counter}
#: a model that computes next to nothing, for launches that are real
_TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
#: columns of the table, behind those of the workload
_COLUMNS = ("total", "critical path", *PARTS, "prompts")
#: cycles of one engine before it is another's turn
_ALTERNATE = 20


def run(arguments: argparse.Namespace) -> int:
    """Time the engine's turns over a null model, or a tiny one; print a table, write the JSON file."""
    if arguments.peer_python and not arguments.compare:
        raise ValidationError("--peer-python is for --compare.")
    if arguments.trace and arguments.trace == arguments.output_json:
        raise ValidationError(f"--trace and --output-json are both {str(arguments.trace)!r}.")
    if len(set(arguments.num_seqs)) < len(arguments.num_seqs):
        raise ValidationError(f"--num-seqs has a number twice: {' '.join(map(str, arguments.num_seqs))}.")
    vllm = pythons(arguments.peer_python, ["vllm"])["vllm"] if arguments.compare else None
    launch = "real launches of a tiny model" if arguments.real_launch else "null model, nothing is launched"
    clock = "processor time of the engine's thread" if arguments.clock == "cpu" else "wall-clock time without waiting"
    kind = "every token is delivered" if arguments.stream else "one output a request"
    print(
        f"{launch}; {clock}, ms: median (99th percentile) of {arguments.steps} steps; {kind}\n"
        f"{HostWorkload(concurrency=1).describe()}\n"
        "critical path: from a step's ids being known to the next launch being done\n"
        "prompts: read and named for the prefix cache, by the tokenizer's threads beside the engine, not in the total\n"
        f"{'sequences':>9} {'tokens':>6} {'mixed':>6} " + " ".join(f"{name:>15}" for name in _COLUMNS)
    )
    results: dict[str, Any] = {"sequences": {}}
    for concurrency in arguments.num_seqs:
        workload = HostWorkload(concurrency=concurrency, stream=arguments.stream)
        results["sequences"][str(concurrency)] = found = _timed(arguments, workload)
        if vllm is not None:
            found["vllm"] = vllm_scheduler.measure(vllm, arguments, workload)
            print(_vllm_row(found["vllm"], found["ms"]))
    if arguments.prefix_cache:
        results["prefix_cache"] = cost = _prefix_cache_cost(arguments, arguments.prefix_cache)
        print(
            f"prefix cache at a hit rate of 0%, {arguments.prefix_cache} sequences: {cost['ms']:.3f} ms a step, "
            f"{cost['share_of_host']:.1%} of the host's {cost['host_ms']:.3f} ms, "
            f"{cost['ms'] / arguments.step_ms:.2%} of a step of {arguments.step_ms:g} ms; "
            f"beside it, in the tokenizer's threads, {cost['prompts_ms']:.3f} ms"
        )
    report.write(arguments.output_json, arguments, results)
    return 0


def _timed(arguments: argparse.Namespace, workload: HostWorkload) -> dict[str, Any]:
    """Time one number of sequences, and print its line of the table."""
    concurrency = workload.concurrency
    with _llm(arguments, workload) as llm, contextlib.ExitStack() as stack:
        driver = Driver(llm, workload, CLOCKS[arguments.clock])
        driver.warm_up(arguments.warm_up)
        traced = arguments.trace and concurrency == max(arguments.num_seqs)
        trace = stack.enter_context(llm.trace()) if traced else None
        cycles = driver.measure(arguments.steps)
        stack.close()
        if trace is not None:
            trace.save_chrome_trace(arguments.trace)
    ms, tokens = summary(cycles), ranks([cycle.num_tokens for cycle in cycles])
    # a mixed step computes more than one token of some sequence
    mixed = sum(cycle.num_tokens > cycle.num_seqs for cycle in cycles) / len(cycles)
    cells = " ".join(f"{ms[name]['p50']:7.3f} ({ms[name]['p99']:5.2f})" for name in _COLUMNS)
    print(f"{concurrency:9} {tokens['p50']:6.0f} {mixed:6.0%} {cells}")
    found = {"ms": ms, "steps": len(cycles), "mixed_share": mixed, "tokens": tokens}
    return {**found, "workload": workload.describe()}


def _vllm_row(found: dict[str, Any], ours: dict[str, dict[str, float]]) -> str:
    """Return one line about vLLM's scheduler, under jaxllm's."""
    parts = ", ".join(
        f"{part} {found['ms'][part]['p50']:.3f} ({found['ms'][part]['p99']:.2f}), "
        f"{found['ms'][part]['p50'] / ours[part]['p50']:.1f} times jaxllm's"
        for part in ("schedule", "update")
    )
    return f"{'':9} {found['tokens']['p50']:6.0f} vLLM {found['version']}, its scheduler alone: {parts}"


def _prefix_cache_cost(arguments: argparse.Namespace, concurrency: int) -> dict[str, float]:
    """Time two engines in turn, with and without a prefix cache, on prompts that have nothing in common.

    The cost comes in bursts, when blocks are full and prompts are admitted: means are compared, of all but the slowest
    hundredth of the steps.
    """
    workload = HostWorkload(concurrency=concurrency, shared_share=0.0)
    with _llm(arguments, workload) as cached, _llm(arguments, workload, enable_prefix_caching=False) as plain:
        drivers = [Driver(llm, workload, CLOCKS[arguments.clock]) for llm in (cached, plain)]
        for driver in drivers:
            driver.warm_up(arguments.warm_up)
        found: list[list[Cycle]] = [[], []]
        while len(found[0]) < arguments.steps:
            for driver, cycles in zip(drivers, found, strict=True):
                cycles += driver.measure(_ALTERNATE)
    with_cache, without = (_mean([1e3 * cycle.total for cycle in cycles]) for cycles in found)
    prompts = [_mean([1e3 * cycle.prompts for cycle in cycles]) for cycles in found]
    cost = with_cache - without
    return {"ms": cost, "host_ms": without, "share_of_host": cost / without, "prompts_ms": prompts[0] - prompts[1]}


def _mean(values: list[float]) -> float:
    kept = sorted(values)[: -(-99 * len(values) // 100)]
    return sum(kept) / len(kept)


class Driver:
    """Keeps an engine busy with a workload, and its times."""

    def __init__(self, llm: LLM, workload: HostWorkload, clock: Callable[[], float]):
        self._core = llm.engine.core.cores[0]
        self._inputs = llm.engine.inputs
        self._requests = enumerate(workload.requests())
        self._concurrency = workload.concurrency
        self.times = HostTimes(clock)
        runner: Any = self._core._runner
        sampling = runner._sampling
        sampling.pack = self.times.timed("pack", sampling.pack)
        execute, wait = runner.execute, self.times.timed("wait", _wait)
        runner.execute = lambda scheduled: _Waited(execute(scheduled), wait)
        self._read = self.times.timed("prompts", self._inputs.reader.read)
        self._core.observe(self.times)

    def measure(self, steps: int) -> list[Cycle]:
        """Run so many steps; returns their times."""
        self.times.cycles.clear()
        while len(self.times.cycles) < steps:
            while self._core.scheduler.num_unfinished < self._concurrency:
                self._add_request()
            self._core.step()
        return list(self.times.cycles)

    def _add_request(self) -> None:
        number, (token_ids, params) = next(self._requests)
        (prompt,) = self._read([token_ids])
        request, _ = self._inputs.request(f"host-{number}", prompt, params)
        self._core.add_request(request, None)

    def warm_up(self, steps: int) -> None:
        """Run until everybody runs, and then so many steps."""
        self.measure(1)
        while self._core.scheduler.stats().num_waiting:
            self.measure(1)
        self.measure(steps)


class _Waited:
    """A launched step whose result is waited for before it is read."""

    def __init__(self, future: StepFuture, wait: Callable[[StepFuture], None]):
        self._future, self._wait = future, wait

    def result(self) -> Any:
        self._wait(self._future)
        return self._future.result()


def _wait(future: Any) -> None:
    sampled = getattr(future, "_sampled", None)
    jax.block_until_ready(getattr(sampled, "token_ids", None))


def _llm(arguments: argparse.Namespace, workload: HostWorkload, *, enable_prefix_caching: bool = True) -> LLM:
    model: dict[str, Any] = {"load_format": "null"}
    if arguments.real_launch:
        model = {"load_format": "dummy", "hf_overrides": _TINY, "dtype": "float32", "device": "cpu"}
    return LLM(
        arguments.model,
        **model,
        max_num_seqs=workload.concurrency,
        max_model_len=workload.max_model_len,
        block_size=workload.block_size,
        max_num_batched_tokens=workload.max_num_batched_tokens,
        num_gpu_blocks_override=workload.num_blocks,
        enable_prefix_caching=enable_prefix_caching,
        disable_log_stats=True,
    )

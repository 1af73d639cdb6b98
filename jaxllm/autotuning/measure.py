"""A workload on an engine of this machine, its requests coming when they come."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.autotuning.capacity import quiet
from jaxllm.autotuning.knob import known_tokens, streams
from jaxllm.engine.observe.trace import Trace
from jaxllm.llm import LLM
from jaxllm.llm_engine import LLMEngine
from jaxllm.runner.memory.plan import MemoryPlan
from jaxllm.tuning.simulation.measure import run_steps
from jaxllm.tuning.simulation.simulated_run import SimulatedRun
from jaxllm.tuning.simulation.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One run, and what else the engine says of it."""

    run: SimulatedRun
    trace: Trace
    plan: MemoryPlan
    #: of steps of every size (`tuning.simulation.measure`); None: they were not asked for
    steps: Trace | None = None


def measure(model: Any, arguments: Mapping[str, Any], workload: Workload, *, with_steps: bool = False) -> MeasuredRun:
    """Start an engine, run the workload, and end the engine. Programs that an engine before has compiled are found in
    the compile cache.

    Args:
        with_steps: run steps of every size behind it, which takes some seconds.

    Raises:
        ValidationError: there is no such engine.
    """
    with quiet(), LLM(model, **arguments) as llm:
        llm.wait_until_ready()
        ids = _ordinary_ids(llm)
        prompts = [list(prompt) for prompt in prompts_of(workload, ids)]
        # the first request of an engine's life pays for what the others do not
        first = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0, detokenize=False)
        llm.generate({"prompt_token_ids": ids[:8]}, first, use_tqdm=False)
        llm.reset_prefix_cache()
        found = _replay(LLMEngine(llm), prompts, workload)
        # without a model, steps of all sizes take no time
        has_steps = with_steps and llm.engine.args.load_format != "null"
        steps = run_steps(llm, most_requests=len(workload)) if has_steps else None
        return MeasuredRun(plan=llm.memory_plan, steps=steps, **found)


def _replay(engine: LLMEngine, prompts: list[list[int]], workload: Workload) -> dict[str, Any]:
    """The run and its trace."""
    requests, is_streamed = workload.requests, streams(workload)
    limit = workload.max_concurrency or len(requests)
    kind = RequestOutputKind.DELTA if is_streamed else RequestOutputKind.FINAL_ONLY
    first = requests[0].arrival
    due = np.array([request.arrival - first for request in requests])
    outputs: dict[str, float] = {}
    gaps: list[float] = []
    coming = 0
    zero = time.monotonic()
    with engine.llm.trace() as trace:
        began = time.monotonic()
        while coming < len(requests) or engine.has_unfinished_requests():
            now = time.monotonic() - began
            while coming < len(requests) and due[coming] <= now:
                if engine.get_num_unfinished_requests() >= limit:
                    break
                if workload.max_concurrency:
                    # it is sent when there is room for it, and its time begins then
                    due[coming] = now
                params = SamplingParams(
                    max_tokens=requests[coming].num_output_tokens,
                    ignore_eos=True,
                    temperature=0.0,
                    detokenize=False,
                    output_kind=kind,
                )
                engine.add_request(str(coming), {"prompt_token_ids": prompts[coming]}, params)
                coming += 1
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, min(due[coming] - (time.monotonic() - began), 0.05)))
                continue
            for output in engine.step():
                if is_streamed and output.outputs[0].token_ids:
                    came = time.monotonic()
                    if output.request_id in outputs:
                        gaps.append(came - outputs[output.request_id])
                    outputs[output.request_id] = came
    run = SimulatedRun.of_trace(trace)
    # a request that came during a step was taken after it, and waited from the moment when it came
    arrivals = due + (began - zero) if run.num_requests == len(due) else run.arrivals
    return {"run": dataclasses.replace(run, arrivals=arrivals, itl=np.array(gaps)), "trace": trace}


def prompts_of(workload: Workload, ids: list[int]) -> Iterator[list[int]]:
    """Prompts of the workload's lengths, which share what its requests share; their own tokens, where these are known.

    Args:
        ids: of which others are drawn.
    """
    for number, request in enumerate(workload.requests):
        if (own := known_tokens(request)) is not None:
            yield own
            continue
        tokens: list[int] = []
        for piece in request.piece_ids:
            tokens += random.Random(f"piece {piece!r}").choices(ids, k=workload.piece_size)
        missing = request.num_prompt_tokens - len(tokens)
        tokens += random.Random(f"request {number}").choices(ids, k=max(missing, 0))
        yield tokens[: request.num_prompt_tokens]


def _ordinary_ids(llm: LLM) -> list[int]:
    """The model's vocabulary without special tokens, which may stand for a picture; tokenizers may know more."""
    size = llm.engine.model_files.config.model.vocab_size
    if llm.engine.args.skip_tokenizer_init:
        return list(range(min(size, 1 << 16)))
    tokenizer = llm.get_tokenizer()
    return sorted(set(range(min(len(tokenizer), size))) - set(tokenizer.all_special_ids))

"""jaxllm's part of the throughput comparison, and the host's part of each step. ``python -m ... FOLDER``"""

from __future__ import annotations

import statistics
import sys
import time

from gpu_check import records
from gpu_check.sizes import sizes
from gpu_check.steps import engine_arguments
from gpu_check.workload import prompts
from jaxllm import LLM, SamplingParams
from jaxllm.engine.observe.trace import StepRecord


def main() -> None:
    size = sizes()
    requests = [{"prompt_token_ids": ids} for ids in prompts(size.model["vocab_size"])]
    params = SamplingParams(temperature=0.0, max_tokens=size.output_len, ignore_eos=True)
    with LLM(sys.argv[1], **engine_arguments()) as llm:
        llm.generate(requests[:2], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)
        start = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        generated = sum(len(output.outputs[0].token_ids) for output in outputs)
        records.check("jaxllm generated everything", generated == size.num_requests * size.output_len, str(generated))
        records.throughput("jaxllm", generated / seconds, seconds=seconds, requests=size.num_requests)
        with llm.trace() as trace:
            llm.generate(requests[: max(len(requests) // 2, 1)], params, use_tqdm=False)
    _host(trace.steps)


def _host(steps: list[StepRecord]) -> None:
    """What the host does for a step that only decodes, and how much of that the device waits for."""
    decodes = [step for step in steps if not step.num_prefill_tokens][2:]
    if not decodes:
        return
    most = max(step.num_seqs for step in decodes)
    full = [step for step in decodes if step.num_seqs == most]
    medians = {
        name: statistics.median(getattr(step, name) for step in full)
        for name in ("schedule_time", "launch_time", "wait_time", "update_time", "device_time")
    }
    records.measurement(
        "host time of a step",
        f"{most} sequences that decode",
        statistics.median(step.host_time for step in full),
        **medians,
    )


if __name__ == "__main__":
    main()

"""This process of ``jaxllm bench startup`` times one start of an engine, from its own start to its first token.

It reads a JSON object from standard input: ``started_at`` (`time.time()` when the process was started), ``model``,
``engine_args``, ``input_len``. The last line that it prints is the result, with the most memory that the process held
and what the engine's plan counts of it: of a KV cache that takes memory as it is written, what has been.
"""

from __future__ import annotations

import time

_RUNNING_SINCE = time.time()

import collections  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

#: JAX's events, and what they are called here. Tracing a function includes tracing those that it calls.
_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower s",
    "/jax/core/compile/backend_compile_duration": "compile or load s",
    "/jax/compilation_cache/cache_retrieval_time_sec": "load from cache s",
    "/jax/compilation_cache/cache_hits": "cache hits",
    "/jax/compilation_cache/cache_misses": "cache misses",
}


def main() -> None:
    job = json.loads(sys.stdin.read())
    phases = {"interpreter": _RUNNING_SINCE - job["started_at"]}
    clock = time.time()
    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.bench.peers.protocol import peak_rss_bytes
    from jaxllm.llm import LLM

    phases["imports"] = time.time() - clock
    compiler = _listen()
    clock = time.time()
    with LLM(job["model"], **job["engine_args"]) as llm:
        phases.update(llm.startup_times)
        phases["rest of the engine"] = time.time() - clock - sum(llm.startup_times.values())
        clock = time.time()
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        llm.generate({"prompt_token_ids": [1] * job["input_len"]}, params, use_tqdm=False)
        now = time.time()
        phases["first token"] = now - clock
        result: dict[str, Any] = {
            "seconds": now - job["started_at"],
            "phases": phases,
            "compiler": {name: round(value, 3) for name, value in compiler.items()},
        }
        # what compiles beside the first steps takes memory, too
        llm.wait_until_ready()
        result["ready_seconds"] = time.time() - job["started_at"]
        plan = llm.memory_plan
        # the largest step takes the activations that the plan counts
        longest = min(plan.max_num_batched_tokens, plan.max_model_len - 1)
        llm.generate({"prompt_token_ids": [1] * longest}, params, use_tqdm=False)
        if plan.device == "cpu":  # whose memory is the process's
            planned = plan.used_bytes * plan.tensor_parallel_size * plan.data_parallel_size
            # the longest request's, the first one's and the trash
            written = min(-(-(longest + 1) // plan.block_size) + 2, plan.num_blocks)
            if getattr(llm.engine.runner.head.programs, "cache_grows", False):  # pyright: ignore
                planned -= plan.kv_cache_bytes * (plan.num_blocks - written) // plan.num_blocks
            result["planned_bytes"] = planned
        result["peak_rss_bytes"] = peak_rss_bytes()
    print(json.dumps(result))


def _listen() -> dict[str, float]:
    """Add up the seconds of JAX's events, or count them, from here on; returns where."""
    import jax.monitoring

    found: dict[str, float] = collections.defaultdict(float)

    def add(event: str, duration_secs: float, **_: Any) -> None:
        if event in _EVENTS:
            found[_EVENTS[event]] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)
    jax.monitoring.register_event_listener(lambda event, **_: add(event, 1))
    return found


if __name__ == "__main__":
    from jaxllm.api.errors import JaxLLMError

    try:
        main()
    except JaxLLMError as error:
        sys.exit(str(error))

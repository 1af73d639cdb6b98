"""This times vLLM's scheduler on the requests that jaxllm's host is timed with."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from typing import Any

from jaxllm.bench.engine_process import answer_of
from jaxllm.bench.host_workload import HostWorkload
from jaxllm.bench.measurements import ranks
from jaxllm.bench.peer_setup import SCRIPTS, environment


def measure(python: str, arguments: argparse.Namespace, workload: HostWorkload) -> dict[str, Any]:
    """Time `schedule` and `update_from_output`, in milliseconds; returns `measurements.ranks` of both and of the tokens
    of a step, and vLLM's version.

    Raises `JaxLLMError` when the process fails; the text has its last words.
    """
    count = workload.num_requests(arguments.steps + 2 * arguments.warm_up)
    requests = [(prompt, params.max_tokens) for prompt, params in itertools.islice(workload.requests(), count)]
    limits = ("concurrency", "max_model_len", "max_num_batched_tokens", "block_size", "num_blocks")
    with tempfile.NamedTemporaryFile("w", prefix="jaxllm-bench-", suffix=".json") as file:
        json.dump(requests, file)
        file.flush()
        job = {
            "requests": file.name,
            **{name: getattr(arguments, name) for name in ("steps", "warm_up", "clock")},
            **{name: getattr(workload, name) for name in limits},
        }
        command = [python, str(SCRIPTS / "run_vllm_scheduler.py")]
        found = answer_of("vLLM's scheduler did not run", command, job, environment(python))
    return {
        "version": found["version"],
        "ms": {part: ranks([1e3 * seconds for seconds in found[part]]) for part in ("schedule", "update")},
        "tokens": ranks(found["tokens"]),
    }

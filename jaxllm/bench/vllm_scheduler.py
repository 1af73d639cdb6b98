"""vLLM's scheduler on the requests that jaxllm's host is timed with."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from jaxllm.api.errors import JaxLLMError
from jaxllm.bench.host_times import numbers
from jaxllm.bench.host_workload import HostWorkload

_SCRIPT = Path(__file__).parent / "peers" / "run_vllm_scheduler.py"
#: of a process that fails, shown
_LAST_CHARACTERS = 2000


def measure(python: str, arguments: argparse.Namespace, workload: HostWorkload) -> dict[str, Any]:
    """Times of `schedule` and `update_from_output` in milliseconds, as `host_times.numbers`, tokens of a step, version.

    Raises `JaxLLMError` when the process fails; the text has its last words.
    """
    count = workload.num_requests(arguments.steps + 2 * arguments.warm_up)
    requests = [(prompt, params.max_tokens) for prompt, params in itertools.islice(workload.requests(), count)]
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as folder:
        file = Path(folder, "requests.json")
        file.write_text(json.dumps(requests))
        job = {
            "requests": str(file),
            "concurrency": workload.concurrency,
            "steps": arguments.steps,
            "warm_up": arguments.warm_up,
            "clock": arguments.clock,
            "max_model_len": workload.max_model_len,
            "max_num_batched_tokens": workload.max_num_batched_tokens,
            "block_size": workload.block_size,
            "num_blocks": workload.num_blocks,
        }
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([python, str(_SCRIPT)], input=json.dumps(job), env=env, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        raise JaxLLMError(
            f"vLLM's scheduler did not run, exit status {done.returncode}:\n{done.stderr[-_LAST_CHARACTERS:].strip()}"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "version": found["version"],
        "ms": {part: numbers([1e3 * seconds for seconds in found[part]]) for part in ("schedule", "update")},
        "tokens": numbers(found["tokens"]),
    }

"""A search on two virtual devices, in a process that has JAX to itself.

``python -m support.tuned_devices FOLDER`` prints one JSON object: what was searched, measured and written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
from support.tiny_model import write_tiny_model

import jaxllm
from jaxllm.tuning.simulation.workload import Workload


def main(folder: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    workload = Workload.of_prompts([[5, 6, 7, number] * 6 for number in range(8)], [6] * 8)
    result = jaxllm.tune(
        write_tiny_model(folder), workload, output=folder / "out", num_trials=12, num_measured=1, rounds=1,
        use_tqdm=False, enforce_eager=True, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4,
        max_num_batched_tokens=32, block_size=16, kv_cache_dtype="auto", num_decode_steps=1,
    )  # fmt: skip
    found = {
        "searched": {knob.name: [knob.shown(value) for value in knob.values] for knob in result.space.all_knobs},
        "measured": [dict(trial.arguments) for trial in result.trials if trial.kind != "simulated" and trial.numbers],
        "simulated": [dict(trial.arguments) for trial in result.trials if trial.kind == "simulated" and trial.numbers],
        "arguments": result.arguments,
        "config": (folder / "out" / "config.yaml").read_text(),
    }
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

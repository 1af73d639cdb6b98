"""Drafters that `support.pairs` has not, beside what requests and engines may be asked for.

``python -m support.drafter_pairs FOLDER`` prints one JSON object, by engine, of what each request got.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from support.drafts import checks_that_cost
from support.pairs import PLAIN, SETTINGS, add_bonus, generated, streamed
from support.tiny_model import write_tiny_model

from jaxllm import LLM, LogitsProcessor

AROUND = ("prefix caching", "preemption", "chunked prefill", "asynchronous scheduling", "tensor parallel")


def main() -> None:
    model = write_tiny_model(Path(sys.argv[1]))
    drafters: dict[str, dict[str, Any]] = {
        "model": {"method": "draft_model", "model": str(model), "num_speculative_tokens": 1},
        "suffix": {"method": "suffix", "num_speculative_tokens": 1},
    }
    settings = {name: value for setting in AROUND for name, value in SETTINGS[setting].items()}
    engines: dict[str, dict[str, Any]] = {
        name: {**settings, "speculative_config": drafter, "enforce_eager": False} for name, drafter in drafters.items()
    }
    found: dict[str, Any] = {}
    # the engine over several devices comes first: what JAX has cannot be changed later
    for name, arguments in {**engines, "plain": {}}.items():
        processors = [LogitsProcessor(add_bonus, extra_args={"bonus": 0.0})]
        # whatever is drafted is checked
        with LLM(model, **{**PLAIN, **arguments}, logits_processors=processors) as llm, checks_that_cost(llm, 0.0):
            found[name] = {"generated": generated(llm, pairs=False), "streamed": streamed(llm, pairs=False)}
            llm.sleep(1)
            llm.wake_up()
            found[name]["after sleep"] = generated(llm, pairs=False)
            values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
            found[name]["preemptions"] = values["vllm:num_preemptions"]
            found[name]["right drafts"] = values.get("vllm:spec_decode_num_accepted_tokens", 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

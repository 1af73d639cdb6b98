"""An extra stage: what drafts bring and cost at Llama-3.1-8B's shape, random weights, for n-grams and for a model that
drafts.

``make gpu-check GPU_CHECK_ARGS="--stages environment drafts"``
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_check import records
from gpu_check.model_folder import write_config
from gpu_check.sizes import sizes
from gpu_check.stages import seconds_left
from gpu_check.steps import engine_arguments
from jaxllm import LLM, SamplingParams

NUM_DRAFTS = 4
#: of one likely token all drafts are right, of twelve nearly none is
KINDS: dict[str, dict[str, Any]] = {
    "right": {"temperature": 0.0, "logit_bias": {61: 100.0}},
    "wrong": {"temperature": 1.0, "seed": 2, "allowed_token_ids": list(range(60, 72))},
}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-check-model-") as name:
        folders = Path(name, "model"), Path(name, "draft")
        for folder, config in zip(folders, (sizes().model, sizes().draft_model), strict=True):
            folder.mkdir()
            write_config(folder, config)
        tokens: dict[str, list[list[int]]] = {}
        for drafter, config in _drafters(folders[1]):
            if seconds_left() < 30:
                records.fact("left out: out of time", drafter)
                continue
            try:
                _measure(drafter, folders[0], config, tokens)
            except Exception as error:  # whatever the card says; the next drafter may do
                records.check(drafter, False, f"{type(error).__name__}: {error}"[:1000])


def _drafters(draft: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    yield "no drafts", None
    yield "n-grams", {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS}
    yield "a model", {"model": str(draft), "num_speculative_tokens": NUM_DRAFTS}


def _measure(drafter: str, model: Path, config: dict[str, Any] | None, tokens: dict[str, list[list[int]]]) -> None:
    size = sizes()
    arguments = {**engine_arguments(), "max_num_seqs": max(size.draft_sequences)}
    if config is not None:
        arguments["enforce_eager"] = False
    with LLM(str(model), **arguments, speculative_config=config) as llm:
        for kind, sampling in KINDS.items():
            params = SamplingParams(**sampling, max_tokens=size.draft_output_len, ignore_eos=True)
            for sequences in size.draft_sequences:
                # runs that come again, so that n-grams find something
                requests = [{"prompt_token_ids": [1 + row % 50, 60, 61, 62] * 16} for row in range(sequences)]
                llm.generate(requests, params, use_tqdm=False)
                start = time.perf_counter()
                outputs = llm.generate(requests, params, use_tqdm=False)
                seconds = time.perf_counter() - start
                metrics = [output.metrics for output in outputs]
                drafted, accepted = (
                    sum(getattr(one, name) for one in metrics if one is not None)
                    for name in ("num_drafted_tokens", "num_accepted_tokens")
                )
                records.measurement(
                    f"drafts/{drafter}",
                    f"{sequences} sequences, drafts are {kind}",
                    seconds / (sequences * size.draft_output_len),
                    drafted=drafted,
                    accepted=accepted,
                )
                if kind == "right":
                    found = [list(output.outputs[0].token_ids) for output in outputs]
                    wanted = tokens.setdefault(str(sequences), found)
                    records.check(f"{drafter}, {sequences} sequences: the same tokens", found == wanted)


if __name__ == "__main__":
    main()

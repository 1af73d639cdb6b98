"""transformers' part of the throughput comparison. ``python -m ... FOLDER generate|continuous``

"generate" is one static batch of all requests, "continuous" is its continuous batching.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from gpu_check import records
from gpu_check.sizes import sizes
from gpu_check.workload import prompts


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    device = torch.device("cpu" if records.is_rehearsal() else "cuda")
    config = json.loads((folder / "config.json").read_text())
    model = random_model(config, device)
    requests = prompts(config["vocab_size"])
    run = {"generate": static_batch, "continuous": continuous_batch}[mode]
    run(model, requests[:2], 4)
    generated, seconds = run(model, requests, sizes().output_len)
    system = f"transformers {mode}"
    records.check(f"{system} generated everything", generated == len(requests) * sizes().output_len, str(generated))
    records.throughput(
        system,
        generated / seconds,
        seconds=seconds,
        requests=len(requests),
        attention=model.config._attn_implementation,
    )


def random_model(config: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    """The model, in bfloat16, with weights drawn on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"}))
    finally:
        torch.set_default_dtype(before)
    model.eval()
    # nothing ends a request but its length
    model.generation_config = generation_config(sizes().output_len)
    return model


def generation_config(length: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=length, min_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=1
    )


@torch.no_grad()
def static_batch(model: LlamaForCausalLM, requests: list[list[int]], length: int) -> tuple[int, float]:
    """Tokens generated, and seconds taken, by one call with all requests, none of which needs padding."""
    ids = torch.tensor(requests, device=model.device)
    start = time.perf_counter()
    result: Any = model.generate(  # pyright: ignore
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=generation_config(length)
    )
    if result.is_cuda:
        torch.cuda.synchronize()
    return int(result.shape[0] * (result.shape[1] - ids.shape[1])), time.perf_counter() - start


@torch.no_grad()
def continuous_batch(model: LlamaForCausalLM, requests: list[list[int]], length: int) -> tuple[int, float]:
    """Tokens generated, and seconds taken, by transformers' scheduler: from its first request's beginning to its last
    one's end, without the cache's allocation and the capture of graphs before and after.
    """
    config = generation_config(length)
    config.min_new_tokens = None
    # -1 never comes
    config.eos_token_id = -1
    limits = {}
    if records.is_rehearsal():  # on a CPU the cache would take all memory
        limits["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    results = model.generate_batch(inputs=requests, generation_config=config, **limits)  # pyright: ignore
    failed = [output.error for output in results.values() if output.error]
    if failed or len(results) != len(requests):
        raise RuntimeError(f"{len(results)} of {len(requests)} requests ended, {len(failed)} in errors: {failed[:1]}")
    spans = [output.lifespan for output in results.values()]
    seconds = max(end for _, end in spans) - min(start for start, _ in spans)
    return sum(len(output.generated_tokens) for output in results.values()), seconds


if __name__ == "__main__":
    main()

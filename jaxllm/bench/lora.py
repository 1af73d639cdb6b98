"""``jaxllm bench lora`` times one batch without adapters, and with as many as there is room for, mixed in it."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxllm import LLM, SamplingParams, TokensPrompt
from jaxllm.api.lora_request import LoRARequest
from jaxllm.bench import report
from jaxllm.bench.datasets import bench_ids
from jaxllm.bench.latency import make_batch
from jaxllm.bench.measurements import turns
from jaxllm.command_options import build_llm
from jaxllm.models.adapters import adapter_modules
from jaxllm.weights.peft import CONFIG, WEIGHTS


def run(arguments: argparse.Namespace) -> int:
    """Time both in turns, by the clock and by the processor, which other programs disturb less; print medians."""
    batch = make_batch(arguments, bench_ids(arguments), arguments.batch_size, arguments.input_len)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in batch]
    params = SamplingParams(max_tokens=arguments.output_len, temperature=0, ignore_eos=True, detokenize=False)
    arguments.enable_lora = True
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, build_llm(arguments, enable_prefix_caching=False) as llm:
        requests = random_adapters(llm, Path(folder), count=arguments.max_loras, rank=arguments.max_lora_rank)
        mixed = [requests[i % len(requests)] for i in range(len(prompts))]
        for turn in turns(arguments):
            for name, loras in (("base", None), ("adapters", mixed)):
                began, busy = time.perf_counter(), time.process_time()
                llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
                if turn >= 0:
                    times = found.setdefault(name, {"seconds": [], "processor_seconds": []})
                    times["seconds"].append(time.perf_counter() - began)
                    times["processor_seconds"].append(time.process_time() - busy)
    for clock in ("seconds", "processor_seconds"):
        base, adapted = (statistics.median(found[name][clock]) for name in ("base", "adapters"))
        text = f"base {base:.3f}, {len(requests)} adapters {adapted:.3f}: {adapted / base:.3f} times as long"
        print(f"{clock.replace('_', ' ')}: {text}")
    report.write(arguments.output_json, arguments, {"rounds": found})
    return 0


def random_adapters(llm: LLM, folder: Path, *, count: int, rank: int) -> list[LoRARequest]:
    """Adapters of all the matrices that can have one, of small random numbers, in PEFT's format."""
    modules = adapter_modules(llm.engine.model_files.config.unquantized_specs)
    requests = []
    for number in range(1, count + 1):
        draw, own, tensors = np.random.default_rng(number), folder / str(number), {}
        for name, module in modules.items():
            for half, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                tensors[f"base_model.model.{name}.lora_{half}.weight"] = np.float32(0.01) * draw.standard_normal(
                    shape, np.float32
                )
        own.mkdir()
        save_file(tensors, own / WEIGHTS)
        (own / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
        requests.append(LoRARequest(f"random {number}", number, own))
    return requests

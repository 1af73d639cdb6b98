"""Engines whose KV cache is in 8 bits answer as transformers with a cache that is rounded in the same way, and each
request gets the same alone and beside others, whatever the chunks are that its prompt is computed in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.pairs import PLAIN, add_bonus, asked, told
from support.rounded_cache import rounded_cache
from support.tiny_model import CONFIG, write_tiny_model

from jaxllm import LLM, LogitsProcessor, SamplingParams
from jaxllm.entrypoints.cli import main
from jaxllm.layers.attention import ScaledPages
from jaxllm.runner.runner import Runner

TEXT = "a line of text that takes several chunks and blocks"
SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as llm-compressor has it after quantizing its KV cache alone: with scales of whole matrices."""
    folder = write_tiny_model(tmp_path_factory.mktemp("fp8"))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(CONFIG["num_hidden_layers"]):
        for name in ("k_scale", "v_scale"):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = np.ones(1, np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stored = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": stored}))
    return folder


@pytest.fixture(scope="module")
def fp8(checkpoint: Path) -> Iterator[LLM]:
    """By its checkpoint; of chunks of up to 8 tokens, and so few blocks that requests are preempted."""
    processors = [LogitsProcessor(add_bonus, extra_args={"bonus": 0.0})]
    small = {"max_num_batched_tokens": 8, "num_gpu_blocks_override": 18, "enable_prefix_caching": True}
    with LLM(checkpoint, **{**PLAIN, **small}, deterministic=True, logits_processors=processors) as llm:
        yield llm


def test_the_cache_is_what_the_checkpoint_says(fp8: LLM):
    runner = fp8.engine.runner
    assert isinstance(runner, Runner)
    cache = runner._live().cache
    assert isinstance(cache, ScaledPages) and cache.numbers.dtype == np.uint8
    plan = fp8.memory_plan
    pages = cache.numbers.shape[0] // runner.head.programs.config.model.num_layers
    assert (cache.numbers.nbytes + cache.scales.nbytes) * plan.num_blocks == plan.kv_cache_bytes * pages


def test_log_probabilities_are_those_of_transformers(fp8: LLM, checkpoint: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    asked = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=0, ignore_eos=True, logprobs=0)
    (output,) = fp8.generate([TEXT], asked, use_tqdm=False)
    entries = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    found = [next(iter(entry.values())).logprob for entry in entries if entry]
    ids = [*(output.prompt_token_ids or []), *output.outputs[0].token_ids]
    config = transformers.LlamaConfig(**{name: value for name, value in CONFIG.items() if name != "architectures"})
    model = transformers.LlamaForCausalLM(config).eval()
    weights = {name: torch.from_numpy(array) for name, array in load_file(checkpoint / "model.safetensors").items()}
    missing, _ = model.load_state_dict(weights, strict=False)
    assert not missing
    with torch.no_grad():
        rounded, plain = (
            model(torch.tensor([ids]), past_key_values=cache).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            for cache in (rounded_cache("fp8"), None)
        )
    assert (rounded - plain).abs().max() > 1e-2, "rounding this small would hide an error"
    # Where a key lies between two numbers of eight bits, sums in another order may round it to the other one.
    off = np.abs(np.array(found) - rounded.numpy())
    assert np.mean(off < 1e-4) > 0.9 and off.max() < 1e-3


def test_requests_get_the_same_alone_and_beside_others(fp8: LLM):
    """To the bit: after preemptions, with prefix hits and in chunks of any size, and after sleep."""
    requests = asked(pairs=False)
    prompts, params = zip(*requests.values(), strict=True)
    before = preemptions(fp8)
    fp8.reset_prefix_cache()
    beside = [told(output) for output in fp8.generate(list(prompts), list(params), use_tqdm=False)]
    assert preemptions(fp8) > before
    fp8.sleep(1)
    fp8.wake_up()
    for name, one, answer in zip(requests, requests.values(), beside, strict=True):
        fp8.reset_prefix_cache()
        for _ in ("computed", "found"):
            assert told(fp8.generate([one[0]], one[1], use_tqdm=False)[0]) == answer, name


def preemptions(llm: LLM) -> Any:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")  # pyright: ignore


@pytest.mark.thorough
def test_the_command(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    main(["plan", str(checkpoint), "--device", "h200", "--kv-cache-dtype", "int8"])
    assert f"a token takes {2 * 2 * 2 * (16 + 4) / 1024:g} KiB of KV cache" in capsys.readouterr().out

"""Every way to ask an engine, and every option of a request, for models that have pairs of their own: with experts,
latents or sinks.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from support.pairs import BEGINNING, PLAIN, add_bonus, assert_same_answer, generated, streamed
from support.tensor_parallel import ARGUMENTS, GREEDY, PROMPTS, generate, tokens

from jaxllm import LLM, BeamSearchParams, LogitsProcessor
from jaxllm.api.metric import Counter

#: what engines have to be started with for that
WAYS_ARGUMENTS: dict[str, Any] = {
    **ARGUMENTS,
    "enable_prompt_embeds": True,
    "record_expert_load": True,
    "reasoning_config": PLAIN["reasoning_config"],
    "logits_processors": [LogitsProcessor(add_bonus, extra_args={"bonus": 0.0})],
}
SHORT = dataclasses.replace(GREEDY, max_tokens=8)


def every_way(llm: LLM, model: Path) -> dict[str, Any]:
    """Args: model: the folder with its weights."""
    found: dict[str, Any] = {"asked": generated(llm, pairs=False), "streamed": streamed(llm, pairs=False)}
    several = generate(llm, PROMPTS, dataclasses.replace(SHORT, n=3, temperature=1.2, seed=3))
    found["several"] = [[list(completion.token_ids) for completion in output.outputs] for output in several]
    beams = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    found["beams"] = [[beam.tokens for beam in output.sequences] for output in llm.beam_search([BEGINNING, "x"], beams)]
    found["texts"] = tokens(generate(llm, PROMPTS, SHORT))
    table = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    ids = [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]
    found["vectors"] = tokens(generate(llm, [{"prompt_embeds": table[each]} for each in ids], SHORT))
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        found[f"sleep {level}"] = tokens(generate(llm, PROMPTS, SHORT))
    return found


def assert_same_ways(found: dict[str, Any], plain: dict[str, Any]) -> None:
    """What two engines made of `every_way`."""
    for kind, expected in plain["asked"].items():
        assert_same_answer(found["asked"][kind], expected, kind)
        assert_same_answer(found["streamed"][kind], expected, kind)
    assert {**found, "asked": None, "streamed": None} == {**plain, "asked": None, "streamed": None}
    assert found["vectors"] == found["sleep 1"] == found["sleep 2"] == found["texts"]


def transformers_greedy(
    folder: Path, prompts: list[str], count: int, *, kv_cache_dtype: str | None = None
) -> list[list[int]]:
    """What transformers makes of prompts with the weights that a folder has.

    Args:
        kv_cache_dtype: of `rounded_cache`; None: it does without a cache.
    """
    import torch
    from support.rounded_cache import rounded_cache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            for _ in range(count):
                cache = None if kv_cache_dtype is None else rounded_cache(kv_cache_dtype)
                ids = torch.cat([ids, model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)], dim=1)
        found.append(ids[0, -count:].tolist())
    return found


def counted(llm: LLM) -> dict[str, Any]:
    """How many tokens each expert got, as a trace and as the metrics of an engine say it that has done nothing else."""
    with llm.trace() as trace:
        outputs = generate(llm, PROMPTS, SHORT)
    llm.reset_prefix_cache()
    assert trace.expert_load is not None
    metrics: dict[str, dict[str, int]] = {}
    for metric in llm.get_metrics():
        if isinstance(metric, Counter) and metric.name == "jaxllm:expert_tokens":
            layer = metrics.setdefault(metric.labels["layer"], {})
            layer[metric.labels["expert"]] = layer.get(metric.labels["expert"], 0) + metric.value
    return {
        "tokens": tokens(outputs),
        "trace": trace.expert_load.tolist(),
        "metrics": {layer: list(counts.values()) for layer, counts in metrics.items()},
    }

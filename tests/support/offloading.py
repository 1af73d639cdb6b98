"""A prompt that leaves the device's prefix cache, and what an engine with `kv_offloading_size` makes of it then."""

from __future__ import annotations

from typing import Any

from jaxllm import LLM, SamplingParams

_GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
#: the beginning of the prompt in whole blocks of 8 tokens
CACHED = 72


def prompt(number: int) -> dict[str, Any]:
    """80 tokens."""
    return {"prompt_token_ids": [(number * 37 + i * i) % 256 for i in range(80)]}


def asked_again(llm: LLM) -> dict[str, Any]:
    """What it answers before and after, with how many cached tokens; in a cache of 24 blocks of 8 tokens, three other
    prompts leave nothing of it on the device.
    """
    llm.reset_prefix_cache(reset_connector=True)
    outputs = [llm.generate(prompt(number), _GREEDY, use_tqdm=False)[0] for number in (1, 2, 3, 4, 1)]
    told = [list(outputs[index].outputs[0].token_ids) for index in (0, -1)]
    return {"tokens": told, "cached": [outputs[index].num_cached_tokens for index in (0, -1)]}


def assert_came_back(found: dict[str, Any]) -> None:
    assert found["cached"] == [0, CACHED]
    assert found["tokens"][0] == found["tokens"][1]

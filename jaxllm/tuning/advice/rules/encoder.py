"""Prompts waited for their pictures: a step makes no more vectors than the encoder's budget, and no more are kept."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.tuning.advice.advice import Advice, Setting
from jaxllm.tuning.advice.load import Load

KIND = "encoder budget"
#: share of the steps that is worth a word
SHARE = 0.05


def advise(load: Load) -> Iterator[Advice]:
    """A budget for what a step would have encoded."""
    waited, steps = int(load.count("jaxllm:steps_encoder_full")), load.count("jaxllm:steps")
    wanted, budget = int(load.gauge("jaxllm:most_encoder_tokens")), load.settings.max_num_encoder_input_tokens
    if not waited or waited < SHARE * steps or budget is None or wanted <= budget:
        return
    yield Advice(
        kind=KIND,
        evidence=f"in {waited} of {steps:.0f} steps a prompt stopped in front of a picture for which there was "
        f"no room; {wanted} vectors were wanted at once, of which the encoder may make {budget}",
        numbers={"steps_encoder_full": waited, "steps": steps, "most_encoder_tokens": wanted},
        setting=Setting("max_num_encoder_input_tokens", 1 << (wanted - 1).bit_length()),
    )

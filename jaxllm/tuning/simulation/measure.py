"""Step times of this machine: an engine runs a few steps of each kind, and a trace times them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.tuning.simulation.fitted_steps import FittedSteps

if TYPE_CHECKING:
    from jaxllm.engine.observe.trace import Trace
    from jaxllm.llm import LLM

#: tokens of a short prompt and of a long one, behind which steps have more to attend to
_SHORT, _LONG = 8, 384
#: tokens that each decodes, and requests of long prompts
_OUTPUTS, _MOST_LONG = 9, 2


def measure_steps(llm: LLM, *, rounds: int = 2) -> FittedSteps:
    """Step times of a running engine, from steps of every size that it has programs for, with short contexts and long
    ones. It has to be idle, and its prefix cache is emptied.

    Args:
        rounds: how often each kind of step is run. They alternate, since machines have slow minutes.

    Raises:
        ValidationError: the engine has no model that generates.
    """
    return FittedSteps.of(run_steps(llm, rounds=rounds).arrays())


def run_steps(llm: LLM, *, rounds: int = 2) -> Trace:
    """The trace of `measure_steps`."""
    plan = llm.memory_plan
    if llm.engine.args.load_format == "null":
        raise ValidationError('load_format="null" has no model whose steps could be timed.')
    draw, longest = random.Random(0), plan.max_model_len
    vocabulary = llm.engine.model_files.config.model.vocab_size
    trace = llm.trace()

    def run(count: int, tokens: int, outputs: int) -> None:
        tokens = max(min(tokens, longest - outputs, plan.num_tokens // count - outputs), 1)
        prompts: list[Any] = [{"prompt_token_ids": draw.choices(range(vocabulary), k=tokens)} for _ in range(count)]
        params = SamplingParams(
            max_tokens=max(min(outputs, longest - tokens), 1), ignore_eos=True, temperature=0.0, detokenize=False
        )
        llm.generate(prompts, params, use_tqdm=False)

    llm.reset_prefix_cache()
    run(1, _SHORT, 2)
    with trace:
        for _ in range(rounds):
            size = 1
            while size <= plan.max_num_batched_tokens:
                run(1, size, 1)
                size = 8 if size == 1 else 2 * size
            count = 1
            while count <= plan.max_num_seqs:
                run(count, _SHORT, _OUTPUTS)
                count *= 2
            run(min(_MOST_LONG, plan.max_num_seqs), _LONG, _OUTPUTS)
    llm.reset_prefix_cache()
    return trace

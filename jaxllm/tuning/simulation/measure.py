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
#: requests of all lengths, of which some have their prompts read in the steps in which others decode; and tokens of
#: their prompts and outputs, at most
_MOST_MIXED, _MIXED_PROMPT, _MIXED_OUTPUT = 12, 256, 24


def measure_steps(llm: LLM, *, rounds: int = 2, most_requests: int | None = None) -> FittedSteps:
    """Step times of a running engine, from steps of every size that it has programs for, with short contexts and long
    ones, and from steps in which some requests decode while prompts of others are read. The engine has to be idle, and
    its prefix cache is emptied.

    Args:
        rounds: how often each kind of step is run. They alternate, since machines have slow minutes.
        most_requests: that will ever run at once; None: as many as the engine has room for.

    Raises:
        ValidationError: the engine has no model that generates.
    """
    return FittedSteps.of(run_steps(llm, rounds=rounds, most_requests=most_requests).arrays())


def run_steps(llm: LLM, *, rounds: int = 2, most_requests: int | None = None) -> Trace:
    """The trace of `measure_steps`."""
    plan = llm.memory_plan
    if llm.engine.args.load_format == "null":
        raise ValidationError('load_format="null" has no model whose steps could be timed.')
    draw, longest = random.Random(0), plan.max_model_len
    # one program serves up to twice as many requests as the next smaller one
    most = min(plan.max_num_seqs, 2 * (most_requests or plan.max_num_seqs) - 1)
    vocabulary = llm.engine.model_files.config.model.vocab_size
    trace = llm.trace()

    def generate(lengths: list[tuple[int, int]]) -> None:
        prompts: list[Any] = [{"prompt_token_ids": draw.choices(range(vocabulary), k=tokens)} for tokens, _ in lengths]
        params = [
            SamplingParams(max_tokens=outputs, ignore_eos=True, temperature=0.0, detokenize=False)
            for _, outputs in lengths
        ]
        llm.generate(prompts, params, use_tqdm=False)

    def run(count: int, tokens: int, outputs: int) -> None:
        tokens = max(min(tokens, longest - outputs, plan.num_tokens // count - outputs), 1)
        generate([(tokens, max(min(outputs, longest - tokens), 1))] * count)

    def run_mixed() -> None:
        count = min(2 * plan.max_num_seqs, _MOST_MIXED)
        most = max(min(_MIXED_PROMPT, longest // 2, plan.num_tokens // count - _MIXED_OUTPUT), 1)
        outputs = max(min(_MIXED_OUTPUT, longest - most), 1)
        generate([(draw.randint(1, most), draw.randint(1, outputs)) for _ in range(count)])

    llm.wait_until_ready()
    llm.reset_prefix_cache()
    run(1, _SHORT, 2)
    with trace:
        for _ in range(rounds):
            size = 1
            while size <= plan.max_num_batched_tokens:
                run(1, size, 1)
                size = 8 if size == 1 else 2 * size
            count = 1
            while count <= most:
                run(count, _SHORT, _OUTPUTS)
                count *= 2
            run(min(_MOST_LONG, plan.max_num_seqs), _LONG, _OUTPUTS)
            run_mixed()
    llm.reset_prefix_cache()
    return trace

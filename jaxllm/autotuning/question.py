"""What a search is asked, and whether it can be asked."""

from __future__ import annotations

from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.autotuning.capacity import Planner
from jaxllm.autotuning.goals import Goals
from jaxllm.autotuning.knob import fitting_grid, needed_length
from jaxllm.runner.memory.fit import DoesNotFitError
from jaxllm.tuning.simulation.workload import Workload

#: arguments that are written nowhere
SECRETS = ("hf_token",)
#: what no search can hold fixed, and what to do
_NOT_SIMULATED = {
    "speculative_config": "Leave it out: drafts of n-grams are measured where the workload has real prompts.",
    "pipeline_parallel_size": "Leave it out: on several devices it is measured with the best of the rest.",
}


def check_question(planner: Planner, workload: Workload) -> None:
    """Raises ValidationError where the fixed arguments contradict the workload, or cannot be held fixed."""
    fixed = planner.fixed
    for name, instead in _NOT_SIMULATED.items():
        if fixed.get(name) not in (None, 1, {}):
            raise ValidationError(f"{name}={fixed[name]!r} is held fixed, and is not simulated. {instead}")
    longest, most = workload.longest, planner.longest()
    if longest > most:
        raise ValidationError(
            f"the workload has a request of {longest} tokens, and the model knows contexts of up to {most}. Take "
            "the request out, or another model."
        )
    asked = fixed.get("max_model_len")
    if isinstance(asked, int) and 0 < asked < longest:
        raise ValidationError(
            f"max_model_len={asked} is held fixed, and the workload has a request of {longest} tokens. Set "
            f"max_model_len to at least {longest}, or leave it out: it is searched then."
        )
    if not planner.generates():
        raise ValidationError("jaxllm tune is for models that generate; this one pools.")


def base_arguments(planner: Planner, workload: Workload) -> dict[str, Any]:
    """What the fixed arguments lack for an engine to be possible: the model's own length may not fit.

    Raises:
        DoesNotFitError: no engine is.
    """
    try:
        fitting_grid(planner, {})
    except DoesNotFitError:
        if planner.fixed.get("max_model_len") is not None:
            raise
        length = {"max_model_len": needed_length(planner, workload)}
        fitting_grid(planner, length)
        return length
    return {}


def question(planner: Planner, workload: Workload, goals: Goals, device: str) -> dict[str, Any]:
    """What trials are trials of."""
    return {
        "model": str(planner.model),
        "device": device,
        "objective": goals.objective,
        "constraints": [str(each) for each in goals.constraints],
        "arguments": {name: str(value) for name, value in planner.fixed.items() if name not in SECRETS},
        "workload": f"{workload} {hash_of(workload)}",
    }


def hash_of(workload: Workload) -> str:
    """The same for equal requests, in any process."""
    import hashlib

    # pieces of another size share other tokens, and fewer requests at a time come otherwise
    digest = hashlib.blake2b(f"{workload.piece_size} {workload.max_concurrency};".encode(), digest_size=8)
    for each in workload.requests:
        digest.update(
            f"{each.arrival:.6f} {each.num_prompt_tokens} {each.num_output_tokens} {each.piece_ids!r};".encode()
        )
    return digest.hexdigest()

"""What stands in the way of an argument, whatever its value: asked where it is given, and where it would be advised."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxllm.config.engine_args import EngineArgs


class Refusal(NamedTuple):
    """An argument that another one, or the machine, leaves no room for."""

    #: what is in the way
    asked: str
    #: the reason, and what would work
    why: str


def several_decode_steps(args: EngineArgs) -> Refusal | None:
    """Why a launch can have no more than one decode step (`num_decode_steps`); None: nothing is in the way."""
    if args.steps_together:
        why = "replicas that have the experts between them go on one step at a time, since none may be done before the "
        return Refusal(stepping_together(args), f"{why}others. Set num_decode_steps=1.")
    if (stages := args.pipeline_parallel_size) > 1:
        why = "one device cannot go on by itself where the next token begins at another one. Set "
        return Refusal(f"pipeline_parallel_size={stages}", f"{why}num_decode_steps=1, or pipeline_parallel_size=1.")
    return None


def host_blocks(args: EngineArgs, *, num_processes: int = 1) -> Refusal | None:
    """Why blocks of the cache cannot be kept in the host's memory (`kv_offloading_size`); None: nothing is in the way.

    Args:
        num_processes: that the devices of one copy of the model belong to.
    """
    config, leave_out = args.speculative_config, "Leave kv_offloading_size out"
    if not args.enable_prefix_caching:
        why = "kept are blocks that leave the prefix cache, and none is in it. Set enable_prefix_caching=True, or "
        return Refusal("enable_prefix_caching=False", f"{why}leave kv_offloading_size out.")
    if config is not None and config.has_layers:
        why = "the keys and values of what drafts are not kept on the host. Leave one of them out, or take "
        return Refusal(f"speculative_config.method={config.method!r}", f"{why}method='ngram'.")
    if args.steps_together:
        why = "blocks of replicas whose steps are one launch are not copied to the host so far."
        return Refusal(stepping_together(args), f"{why} {leave_out}, or enable_expert_parallel.")
    if num_processes > 1:
        why = "blocks are copied to the host on devices of one process so far."
        return Refusal(f"devices of {num_processes} processes", f"{why} {leave_out}.")
    return None


def stepping_together(args: EngineArgs) -> str:
    """What makes replicas step together, as it is asked for."""
    return f"enable_expert_parallel=True with data_parallel_size={args.data_parallel_size}"

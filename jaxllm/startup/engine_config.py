"""The configuration of an engine that does not run yet, under vLLM's names."""

from __future__ import annotations

from jaxllm.config.engine_args import EngineArgs
from jaxllm.config.resolve import default_block_size
from jaxllm.config.vllm_config import VllmConfig, vllm_config
from jaxllm.runner.compile.target import target_here
from jaxllm.startup.setup import read_setup
from jaxllm.weights.resolve import resolve


def engine_config(args: EngineArgs) -> VllmConfig:
    """What an engine of these arguments will be on this machine's devices, from the model's config alone: it says
    nothing of the number of blocks. Raises what `LLM` does for these arguments before it loads anything.
    """
    path = resolve(args.model, revision=args.revision, token=args.hf_token, part="config")
    setup = read_setup(args, path)
    target = target_here(args.device, args.grid, together=args.steps_together)
    return vllm_config(
        setup.args,
        setup.checkpoint.config,
        scheduler=setup.limits(target),
        dtype=setup.dtype(target),
        pools=setup.pooler is not None,
        block_size=args.block_size or default_block_size(target.platform),
        num_blocks=args.num_gpu_blocks_override,
    )

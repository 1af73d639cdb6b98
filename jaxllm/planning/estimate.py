"""Where there is no compiler to ask, shapes tell what a step needs beside weights and cache on a GPU.

The largest arrays that live at the same time: of the forward step, the MLP's (both projections, their product, the
residual stream and what is added to it) or the attention's; of the sampler, a few copies of a block of logits. Fitted
to what XLA of JAX 0.10.2 reports for dense models of 135M to 32B on sm_80 to sm_100; `FACTOR` is checked where the
compiler is (tests/compile_cuda).
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxllm.layers.vision import TILE_SCORES
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.runner.heads.sampling_programs import SAMPLE_ROWS_GPU
from jaxllm.runner.runner_config import RunnerConfig

#: float32 copies of a block of logits in the sampler
LOGITS_COPIES = 6
#: up to so many tokens the MLP's wide product is kept in float32 before it is rounded
UNROUNDED_TOKENS = 4096
#: how far off an estimate may be, either way
FACTOR = 1.5


def estimated_activations(config: RunnerConfig, num_blocks: int) -> tuple[int, ...]:
    """Return the bytes of temporaries and outputs of the largest step, on one device of each pipeline stage
    (`fit.Activations`).
    """
    return tuple(map(_of_stage, config.stages))


def _of_stage(config: RunnerConfig) -> int:
    return config.fetched_bytes + _computed(config)


def _computed(config: RunnerConfig) -> int:
    model, limits = config.step_model, config.scheduler
    size = jnp.dtype(config.dtype).itemsize
    hidden, seqs, tokens = model.hidden_size, config.row_capacity, limits.max_num_batched_tokens
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    queries = heads * model.head_dim
    if isinstance(model, DecoderConfig) and model.latents is not None:
        queries = 3 * model.num_heads * model.latents.width
    widest = max(3 * model.intermediate_size, queries) * size
    if isinstance(model, DecoderConfig) and model.moe is not None:
        # a row for each of a token's experts, of the tokens of all replicas that step together: what goes in, both
        # projections, their product, what comes out
        own = model.moe.intermediate_size // (1 if model.moe.expert_parallel else config.target.num_devices)
        rows = config.target.replicas * model.moe.top_k
        widest = max(widest, rows * (3 * own * size + hidden * (2 * size + 4)))
    unrounded = 2 * model.intermediate_size * 4 + model.intermediate_size * size
    stream = 3 * hidden * size
    layer = max(tokens * (widest + stream), min(tokens, UNROUNDED_TOKENS) * (unrounded + stream))
    tables = len(config.groups) * seqs * config.table_width * 4
    if config.pooler is not None:
        return max(layer + seqs * hidden * size + tables, _of_encoder(config))
    outputs = (seqs + limits.max_scored_tokens) * hidden * size
    if config.stage is not None and not config.stage.is_last:
        return max(layer + tables + tokens * hidden * size, _of_encoder(config))
    block = min(SAMPLE_ROWS_GPU[-1], seqs) * model.vocab_size * 4
    return max(layer + outputs + tables, LOGITS_COPIES * block, _of_encoder(config))


def _of_encoder(config: RunnerConfig) -> int:
    """Of the largest picture: a layer's widest arrays, and a block of its scores."""
    vision, size = config.vision, jnp.dtype(config.dtype).itemsize
    if vision is None:
        return 0
    widest = max(3 * vision.hidden_size, 3 * vision.intermediate_size) + 3 * vision.hidden_size
    scores = 2 * vision.num_heads * max(TILE_SCORES, config.encoder_patches) * 4
    return config.encoder_patches * widest * size + scores

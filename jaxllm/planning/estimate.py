"""What a step needs beside weights and cache on a GPU, from shapes alone, where there is no compiler to ask.

The largest arrays that live at the same time: of the forward step, the MLP's (both projections, their product, the
residual stream and what is added to it) or the attention's; of the sampler, a few copies of a block of logits. Fitted
to what XLA 0.10.2 reports for dense models of 135M to 32B on sm_80 to sm_100, and within a factor of 1.5 of it
(tests/compile_cuda).
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxllm.runner.programs import SAMPLE_ROWS_GPU
from jaxllm.runner.runner_config import RunnerConfig

#: float32 copies of a block of logits in the sampler
LOGITS_COPIES = 6
#: how far off it may be
FACTOR = 1.5


def estimated_activations(config: RunnerConfig, num_blocks: int) -> int:
    """Bytes of temporaries and outputs of the largest step, on one device (`plan.Activations`)."""
    model, limits = config.step_model, config.scheduler
    size = jnp.dtype(config.dtype).itemsize
    hidden, seqs, tokens = model.hidden_size, limits.max_num_seqs, limits.max_num_batched_tokens
    heads = model.num_heads + 2 * model.num_kv_heads
    # two projections, and their product
    mlp = 3 * model.intermediate_size * size
    attention = (heads + model.num_heads) * model.head_dim * size
    per_token = max(mlp, attention) + 3 * hidden * size
    rows = 1 + limits.max_scored_tokens if config.pooler is None else 1
    tables = len(config.groups) * seqs * config.table_width * 4
    forward = tokens * per_token + (seqs + rows) * hidden * size + tables
    if config.pooler is not None:
        return forward
    block = min(SAMPLE_ROWS_GPU[-1], seqs) * model.vocab_size * 4
    return max(forward, LOGITS_COPIES * block)

"""What an engine's model was read from, for saving it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.models.model import base_prefix
from jaxllm.models.params import without_draft
from jaxllm.weights import saved_model
from jaxllm.weights.named_tensors import with_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.runner.runner_config import RunnerConfig
    from jaxllm.weights.checkpoint import Checkpoint


class ModelFiles:
    """A checkpoint, and how the engine understood it.

    Args:
        config: what the runner was built from.
        others: files of the model that say how it is used (sentence-transformers', its processor's), relative to its
            directory.
    """

    def __init__(self, checkpoint: Checkpoint, config: RunnerConfig, others: tuple[str, ...]):
        self.checkpoint, self.config = checkpoint, config
        self._others = others

    def save(self, folder: Path, params: Any, tokenizer: PreTrainedTokenizerBase | None, *, format: str) -> None:
        """Write the model with the weights `params`. Raises what `LLM.save` does."""
        if self.config.target.num_processes > 1:
            raise ValidationError(
                f"The weights of this engine lie in {self.config.target.num_processes} processes, and none has all of "
                "them: save works on devices of one process. To save them, hand apply_model's arrays to Orbax."
            )
        checkpoint = self.checkpoint
        files = {name: (checkpoint.path / name).read_bytes() for name in self._others}
        if checkpoint.generation_config:
            files["generation_config.json"] = json.dumps(checkpoint.generation_config, indent=2).encode()
        # of a file of its own, in older checkpoints
        own = None if checkpoint.is_gguf else checkpoint.quantization_config
        stored = {} if own is None else {"quantization_config": own}
        saved_model.save(
            folder,
            params,
            format=format,
            model=self.config.model,
            specs=without_draft(self.config.specs()),
            quantization=self.config.quantization,
            config={**checkpoint.config, **stored},
            files=files,
            tokenizer=tokenizer,
        )

    def with_tensors(self, params: Any, tensors: Mapping[str, Any]) -> Any:
        """The weights `params` with tensors replaced, by Hugging Face's names (`named_tensors.with_tensors`).

        Raises ValidationError also where weights are quantized, or lie in several processes.
        """
        config = self.config
        if config.quantization is not None:
            raise ValidationError(
                f"The engine's weights are quantized ({config.quantization.method.name}): it takes no tensors by name. "
                "Write them to a directory and start an engine from it, or start this one without quantization."
            )
        if config.target.num_processes > 1:
            raise ValidationError(
                f"The weights of this engine lie in {config.target.num_processes} processes, which take no tensors by "
                "name: give update_weights a pytree as apply_model shows it."
            )
        # a classifier is made of rows of the head
        has_head = config.pooler is None or self.checkpoint.classifier is not None
        return with_tensors(
            params,
            tensors,
            specs=without_draft(config.specs()),
            sharding=without_draft(config.sharding),
            dtype=jnp.dtype(config.dtype),
            prefix=base_prefix(config.model),
            has_head=has_head and not getattr(config.model, "tie_word_embeddings", False),
        )

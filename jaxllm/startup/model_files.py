"""What an engine's model was read from, for saving it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.models.params import without_draft
from jaxllm.weights import saved_model

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

"""Names of tensors, where checkpoints of one model differ in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

#: what the names of the modules begin with that see images
TOWERS = ("visual.", "vision_tower.", "multi_modal_projector.")
#: heads stand beside the body, never inside
_HEADS = (
    *TOWERS,
    "lm_head.",
    "image_newline",
    "embed_out.",
    "score.",
    "classifier.",
    "cls.",
)
#: TensorFlow's names of a norm's weights, in BERT's first checkpoints
_OLD_ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


#: the parts of a model that sees images, as older and newer checkpoints name them -> the text as it is by itself, the
#: tower and what is behind it as they are called here
_PARTS = {
    "language_model.model.": "model.",
    "language_model.": "",
    "model.language_model.": "model.",
    # the tower of Qwen's models
    "model.visual.": "visual.",
    "vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}


class _Reader(Protocol):
    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray: ...
    def raw(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray: ...


class CommonNames:
    """A checkpoint under the names that its model has as part of a larger one.

    Args:
        prefix: what the names of the body begin with (``model.``); checkpoints of the body alone leave it out.
    """

    def __init__(self, reader: _Reader, prefix: str):
        self._reader = reader
        stored = {_part(name): name for name in reader.names()}
        bare = not any(name.startswith(prefix) for name in stored)
        self._stored = {_common(name, prefix if bare else ""): where for name, where in stored.items()}

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def stored_name(self, name: str) -> str:
        """The one that the checkpoint has."""
        return self._stored.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self.stored_name(name))

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        return self._reader.read(self.stored_name(name), rows, within)

    def dtype(self, name: str) -> str:
        return self._reader.dtype(self.stored_name(name))

    def raw(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        return self._reader.raw(self.stored_name(name), rows, within)


def _part(name: str) -> str:
    for outer, inner in _PARTS.items():
        if name.startswith(outer):
            return inner + name.removeprefix(outer)
    return name


def spellings(name: str) -> list[str]:
    """What a configuration may call a module of a model: the name that it has by itself, and those that checkpoints of
    models that see images, and of the body alone, have for it.
    """
    outside = [outer + name.removeprefix(inner) for outer, inner in _PARTS.items() if name.startswith(inner)]
    return list(dict.fromkeys([name, *outside, name.removeprefix("model.")]))


def among_parts(name: str) -> str:
    """The name that checkpoints of transformers 4 and vLLM have for a tensor of a model with LLaVA's parts."""
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name if name.startswith(("multi_modal_projector.", "image_newline")) else f"language_model.{name}"


def _common(name: str, prefix: str) -> str:
    for old, new in _OLD_ENDS.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name if name.startswith(_HEADS) else prefix + name

"""A classification head made of a generating model's last matrix, for rerankers that answer with one of two tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from jaxllm.layers.weight_storage import MARK
from jaxllm.weights.naming import CommonNames
from jaxllm.weights.quantization.reader import QuantizedTensors

_MADE = "score.weight"
#: where a token's row is: in a matrix of its own, or in the one that embeds
_SOURCES = ("lm_head.weight", "model.embed_tokens.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierRows:
    """Which tokens' rows the head is made of."""

    token_ids: tuple[int, ...]
    #: one class, whose score is how much likelier the second of two tokens is than the first; else each has its own
    difference: bool


class WithClassifier:
    """A checkpoint that has the head, too. One that has a head of its own, as what `LLM.save` writes, keeps it."""

    def __init__(self, reader: CommonNames | QuantizedTensors, rows: ClassifierRows):
        self._reader, self._rows = reader, rows
        # a matrix in a form of its own can be read as numbers, too
        names = {name.partition(MARK)[0] for name in reader.names()}
        self._source = None if _MADE in names else next((name for name in _SOURCES if name in names), None)

    def names(self) -> Iterable[str]:
        return self._reader.names() if self._source is None else [*self._reader.names(), _MADE]

    def shape(self, name: str) -> tuple[int, ...]:
        if name != _MADE or self._source is None:
            return self._reader.shape(name)
        num_classes = 1 if self._rows.difference else len(self._rows.token_ids)
        return num_classes, self._reader.shape(self._source)[1]

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        if name != _MADE or self._source is None:
            return self._reader.read(name, rows, within)
        found = [self._reader.read(self._source, slice(i, i + 1)).astype(np.float32) for i in self._rows.token_ids]
        head = found[1] - found[0] if self._rows.difference else np.concatenate(found)
        return head if rows is None else head[rows]

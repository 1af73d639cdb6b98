"""What pooling requests return: vLLM's outputs, with its field names."""

from __future__ import annotations

import dataclasses
from typing import Generic, TypeVar

import numpy as np

from jaxllm.api.outputs import RequestMetrics

T = TypeVar("T")


@dataclasses.dataclass(kw_only=True, repr=False)
class PoolingOutput:
    """A pooled result as it comes from the model."""

    #: f32 [size], or [tokens, size] for the token tasks; empty when the request was refused
    data: np.ndarray

    def __repr__(self) -> str:
        return f"PoolingOutput(data=<{'x'.join(map(str, self.data.shape))}>)"


@dataclasses.dataclass(kw_only=True, repr=False)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclasses.dataclass(kw_only=True, repr=False)
class ClassificationOutput:
    #: one a class; what the model's activation made of its scores
    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)

    def __repr__(self) -> str:
        return f"ClassificationOutput(num_classes={self.num_classes})"


@dataclasses.dataclass(kw_only=True)
class ScoringOutput:
    #: how well the two texts fit; NaN when the request was refused
    score: float


@dataclasses.dataclass(frozen=True)
class LateChunk:
    #: its first token, and the one behind its last
    token_range: tuple[int, int]
    #: the part of the text that its tokens were made of; None: it has special tokens only
    char_range: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class LateChunkingMetadata:
    """Which part of the text each row of a late-chunked embedding stands for."""

    chunk_size: int
    input_tokens: int
    chunks: list[LateChunk]
    strategy: str = "fixed_tokens"


@dataclasses.dataclass(kw_only=True)
class PoolingRequestOutput(Generic[T]):
    """A prompt and what was made of it."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    finished: bool
    #: prompt tokens that the prefix cache had
    num_cached_tokens: int = 0
    metrics: RequestMetrics = dataclasses.field(default_factory=RequestMetrics, repr=False)
    #: why the request was refused or could not be finished; None: it was not
    error: str | None = None
    #: whether that is its own fault: it was not cut short
    is_refused: bool = False
    #: position of the prompt among those of the call
    index: int = 0
    #: with `LateChunkingParams`: what each row of the data stands for
    late_chunking: LateChunkingMetadata | None = None

    def replaced(self, outputs: object) -> dict[str, object]:
        """Constructor arguments of an output that differs in `outputs`."""
        fields = (field.name for field in dataclasses.fields(self))
        return {**{name: getattr(self, name) for name in fields}, "outputs": outputs}


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """A prompt and its embedding."""

    @classmethod
    def from_base(cls, base: PoolingRequestOutput[PoolingOutput]) -> EmbeddingRequestOutput:
        return cls(**base.replaced(EmbeddingOutput(embedding=base.outputs.data.tolist())))  # pyright: ignore[reportArgumentType]


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """A prompt and its classes."""

    @classmethod
    def from_base(cls, base: PoolingRequestOutput[PoolingOutput]) -> ClassificationRequestOutput:
        return cls(**base.replaced(ClassificationOutput(probs=base.outputs.data.tolist())))  # pyright: ignore[reportArgumentType]


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """A pair of prompts and its score."""

    @classmethod
    def from_base(cls, base: PoolingRequestOutput[PoolingOutput]) -> ScoringRequestOutput:
        data = base.outputs.data
        return cls(**base.replaced(ScoringOutput(score=float(data[0]) if data.size else float("nan"))))  # pyright: ignore[reportArgumentType]


def failed_pooling(
    request_id: str, reason: str, *, is_refused: bool = False, index: int = 0
) -> PoolingRequestOutput[PoolingOutput]:
    """What a request gets that was refused or could not be finished."""
    return PoolingRequestOutput(
        request_id=request_id,
        outputs=PoolingOutput(data=np.zeros(0, np.float32)),
        prompt_token_ids=[],
        finished=True,
        error=reason,
        is_refused=is_refused,
        index=index,
    )

"""`PoolingParams`: what one request asks of a pooling model, under vLLM's names."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.api.pooler import EMBED_TASKS, POOLING_TASKS, TOKEN_TASKS, Pooler, one_of_two_names
from jaxllm.api.pooling_outputs import LateChunkingMetadata

#: which parameters each task takes
_PARAMETERS = {
    "embed": ("dimensions", "use_activation"),
    "token_embed": ("dimensions", "use_activation", "late_chunking_params"),
    "classify": ("use_activation",),
    "token_classify": ("use_activation",),
}


@dataclasses.dataclass(frozen=True)
class LateChunkingParams:
    """Embeddings of chunks of a text, each the mean of its tokens' states after the model has read the whole text.

    Special tokens count, and are part of the means.
    """

    #: tokens of a chunk
    chunk_size: int

    def __post_init__(self) -> None:
        size = self.chunk_size
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**63:
            raise ValidationError(f"chunk_size must be a positive integer less than 2**63, got {size!r}")


@dataclasses.dataclass(kw_only=True, slots=True)
class PoolingParams:
    """What one request asks of a pooling model; None takes the model's own default.

    Raises:
        ValidationError: a value has the wrong type or lies outside its range.
    """

    #: keep only this many tokens of the prompt, special ones included; -1: as many as the model takes
    truncate_prompt_tokens: int | None = None
    #: keep only this many leading components of an embedding (Matryoshka models)
    dimensions: int | None = None
    #: normalise an embedding; make probabilities of class scores
    use_activation: bool | None = None
    #: older name of `use_activation`, of embeddings
    normalize: bool | None = None
    #: with STEP pooling: return the rows of this token, and these columns
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None
    #: "embed", "classify", "token_embed" or "token_classify"; the methods set it
    task: str | None = None
    #: compute the whole prompt even where the cache has it
    skip_reading_prefix_cache: bool | None = None
    #: with the task "token_embed": one row a chunk in place of one a token
    late_chunking_params: LateChunkingParams | None = None
    #: position at which the prompt's second segment begins; set by `LLM.score` for pairs
    segment_start: int | None = dataclasses.field(default=None, repr=False)
    #: where the chunks are; set when the text is tokenized
    late_chunking: LateChunkingMetadata | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.truncate_prompt_tokens is not None:
            self.truncate_prompt_tokens = truncation(self.truncate_prompt_tokens)
        if self.dimensions is not None:
            self.dimensions = checks.integer("dimensions", self.dimensions)
            if self.dimensions < 1:
                raise ValidationError(f"Dimensions must be greater than 0, got {self.dimensions}.")
        self.use_activation = one_of_two_names(self.use_activation, self.normalize)
        self.normalize = None
        if self.step_tag_id is not None:
            self.step_tag_id = checks.integer("step_tag_id", self.step_tag_id)
        if self.returned_token_ids is not None:
            self.returned_token_ids = checks.token_ids("returned_token_ids", self.returned_token_ids)
        given = self.late_chunking_params
        if given is not None and not isinstance(given, LateChunkingParams):
            raise ValidationError(f"late_chunking_params must be LateChunkingParams(chunk_size=...), got {given!r:.80}")
        if self.task is not None and self.task not in POOLING_TASKS:
            raise ValidationError(f"task must be one of {', '.join(POOLING_TASKS)}; got {self.task!r}.")
        if self.skip_reading_prefix_cache is not None:
            self.skip_reading_prefix_cache = checks.boolean("skip_reading_prefix_cache", self.skip_reading_prefix_cache)

    def clone(self) -> PoolingParams:
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

    @property
    def wants_tokens(self) -> bool:
        """Whether the result has a row for every token."""
        return self.task in TOKEN_TASKS

    def resolved(self, task: str, pooler: Pooler, *, model: str, hidden_size: int) -> PoolingParams:
        """A copy with every default filled in, for one task of one model.

        Raises:
            ValidationError: a parameter that the task or the model has no use for, or that it cannot honour.
        """
        if self.task not in (None, task):
            raise ValidationError(f"You cannot overwrite self.task={self.task!r} with task={task!r}!")
        params = self.clone()
        params.task = task
        valid = _PARAMETERS[task]
        if params.late_chunking_params is not None:
            if task != "token_embed":
                raise ValidationError("Late chunking requires token_embed")
            if params.step_tag_id is not None or params.returned_token_ids is not None:
                raise ValidationError("Late chunking requires all token rows")
        steps = pooler.tok_pooling_type == "STEP" and params.wants_tokens
        invalid = [name for name in _PARAMETERS["embed"] if name not in valid and getattr(self, name) is not None]
        if not steps:
            invalid += [n for n in ("step_tag_id", "returned_token_ids") if getattr(self, n) is not None]
        if invalid:
            raise ValidationError(
                f"Task {task} only supports {list(valid)} parameters, does not support {invalid} parameters"
            )
        if params.dimensions is not None:
            _check_dimensions(params.dimensions, pooler, model, hidden_size)
        elif task in EMBED_TASKS:
            params.dimensions = pooler.dimensions
        if params.use_activation is None:
            params.use_activation = pooler.use_activation
        if steps:
            params.step_tag_id = pooler.step_tag_id if self.step_tag_id is None else self.step_tag_id
            if self.returned_token_ids is None and pooler.returned_token_ids is not None:
                params.returned_token_ids = list(pooler.returned_token_ids)
            most = max(params.returned_token_ids or [0])
            if most >= (pooler.num_labels or hidden_size):
                raise ValidationError(
                    f"returned_token_ids has {most}, but a token's result has {pooler.num_labels or hidden_size} "
                    "columns"
                )
        # what every token adds to cannot come out of the cache, which holds keys and values only
        if params.wants_tokens or pooler.seq_pooling_type != "LAST":
            params.skip_reading_prefix_cache = True
        return params


def truncation(value: Any) -> int:
    """A checked `truncate_prompt_tokens`."""
    number = checks.integer("truncate_prompt_tokens", value)
    if number < 1 and number != -1:
        raise ValidationError(
            f"truncate_prompt_tokens must be at least 1, or -1 for the longest that the model takes, got {number}."
        )
    return number


def _check_dimensions(dimensions: int, pooler: Pooler, model: str, hidden_size: int) -> None:
    if not pooler.is_matryoshka:
        raise ValidationError(
            f'Model "{model}" does not support matryoshka representation, changing output dimensions will lead to '
            "poor results. If it was trained for it, pass hf_overrides={'is_matryoshka': True}."
        )
    allowed = pooler.matryoshka_dimensions
    if allowed and dimensions not in allowed:
        raise ValidationError(
            f'Model "{model}" only supports {list(allowed)} matryoshka dimensions, use other output dimensions will '
            "lead to poor results."
        )
    if dimensions > hidden_size:
        raise ValidationError(f"dimensions must be at most {hidden_size}, the model's own, got {dimensions}.")

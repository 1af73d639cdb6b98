"""How hidden states become embeddings, classes and scores: vLLM's `PoolerConfig`, and what it resolves to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError

SEQ_POOLING_TYPES = ("CLS", "LAST", "MEAN")
TOK_POOLING_TYPES = ("ALL", "STEP")
EMBED_TASKS = ("embed", "token_embed")
CLASSIFY_TASKS = ("classify", "token_classify")
POOLING_TASKS = (*EMBED_TASKS, *CLASSIFY_TASKS)
#: tasks whose result has a row for every token
TOKEN_TASKS = ("token_embed", "token_classify")


@dataclasses.dataclass(kw_only=True)
class PoolerConfig:
    """What the user says about pooling, under vLLM's names; None leaves it to the model's own files.

    Raises:
        ValidationError: a value has the wrong type, lies outside its range, or contradicts another one.
    """

    #: the task of `LLM.encode` when it is not told one
    task: str | None = None
    #: sets `seq_pooling_type` or `tok_pooling_type`, whichever it is one of
    pooling_type: str | None = None
    #: "CLS", "LAST" or "MEAN": which tokens a sequence's vector comes from
    seq_pooling_type: str | None = None
    #: "ALL" or "STEP": which tokens the token tasks return
    tok_pooling_type: str | None = None
    #: normalise embeddings; sigmoid or softmax over classes
    use_activation: bool | None = None
    #: older name of `use_activation`, of embeddings
    normalize: bool | None = None
    #: leading components of embeddings to keep (Matryoshka models)
    dimensions: int | None = None
    #: class scores become ``activation((score - logit_mean) / logit_sigma)``
    logit_mean: float | None = None
    logit_sigma: float | None = None
    #: with "STEP": keep the rows of this token
    step_tag_id: int | None = None
    #: with "STEP": keep these columns
    returned_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("task", POOLING_TASKS),
            ("pooling_type", SEQ_POOLING_TYPES + TOK_POOLING_TYPES),
            ("seq_pooling_type", SEQ_POOLING_TYPES),
            ("tok_pooling_type", TOK_POOLING_TYPES),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            value = value.upper() if isinstance(value, str) and name != "task" else value
            if value not in choices:
                raise ValidationError(f"pooler_config.{name} must be one of {', '.join(choices)}; got {value!r}.")
            setattr(self, name, value)
        for name in ("seq_pooling_type", "tok_pooling_type"):
            if self.pooling_type is not None and getattr(self, name) not in (None, self.pooling_type):
                raise ValidationError(f"Cannot set both `pooling_type` and `{name}`")
        if self.pooling_type in SEQ_POOLING_TYPES:
            self.seq_pooling_type = self.pooling_type
        elif self.pooling_type is not None:
            self.tok_pooling_type = self.pooling_type
        self.use_activation = one_of_two_names(self.use_activation, self.normalize)
        if self.dimensions is not None and checks.integer("dimensions", self.dimensions) < 1:
            raise ValidationError(f"Dimensions must be greater than 0, got {self.dimensions}.")
        for name in ("logit_mean", "logit_sigma"):
            if getattr(self, name) is not None:
                setattr(self, name, checks.real(name, getattr(self, name)))
        if self.logit_sigma == 0:
            raise ValidationError("logit_sigma cannot be 0 (division by zero)")
        if self.step_tag_id is not None:
            self.step_tag_id = checks.integer("step_tag_id", self.step_tag_id)
        if self.returned_token_ids is not None:
            self.returned_token_ids = checks.token_ids("returned_token_ids", self.returned_token_ids)


def pooler_config(name: str, value: Any) -> PoolerConfig:
    """A `PoolerConfig` from what was given as an engine argument: one, or a mapping of its fields."""
    if isinstance(value, PoolerConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValidationError(f"{name} must be a PoolerConfig or a dict, got {value!r} of type {type(value).__name__}.")
    known = [field.name for field in dataclasses.fields(PoolerConfig)]
    for key in value:
        if key not in known:
            raise ValidationError(f"{name} has no field {key!r}; it has: {', '.join(known)}.")
    return PoolerConfig(**value)


def one_of_two_names(use_activation: Any, normalize: Any) -> bool | None:
    """The value that `use_activation` and its older name agree on."""
    given = {
        checks.boolean(name, value)
        for name, value in (("use_activation", use_activation), ("normalize", normalize))
        if value is not None
    }
    if len(given) > 1:
        raise ValidationError("use_activation and normalize are two names of one thing, and got different values.")
    return given.pop() if given else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseModule:
    """A layer that embeddings go through, a module of sentence-transformers."""

    #: its folder in the model's directory
    path: str
    in_features: int
    out_features: int
    bias: bool
    #: "identity" or "tanh"
    activation: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pooler:
    """What a pooling engine computes. Hashable: a compiled step is made for one of these."""

    #: of the sequence tasks
    seq_pooling_type: str
    tok_pooling_type: str = "ALL"
    #: of the classification head; 0: there is none, the results are embeddings
    num_labels: int = 0
    #: of a classification head with a dense layer in front of its last one (`models.names.ClassifierNames`)
    dense_activation: str = "tanh"
    norm_eps: float = 1e-5
    #: what embeddings go through, in this order
    dense_modules: tuple[DenseModule, ...] = ()
    #: what `use_activation` applies to class scores: "identity", "sigmoid" or "softmax"
    activation: str = "identity"
    logit_mean: float = 0.0
    logit_sigma: float = 1.0
    #: defaults of requests
    use_activation: bool = True
    dimensions: int | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    #: of `LLM.encode` when it is not told one
    task: str | None = None
    #: whether embeddings may be cut, and to which sizes (empty: any)
    is_matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """What `LLM.encode` can be asked for."""
        return CLASSIFY_TASKS if self.num_labels else EMBED_TASKS

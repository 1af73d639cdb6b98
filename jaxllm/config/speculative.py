"""Who drafts tokens, and how many, for the model to verify."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxllm.api.checks import real
from jaxllm.api.errors import ValidationError
from jaxllm.config import argument_checks as check
from jaxllm.config.argument import Arguments, argument, not_built, not_yet
from jaxllm.config.quantization import weight_method

#: a method's names
METHODS = {
    "ngram": ("ngram", "[ngram]", "ngram_gpu"),
    "suffix": ("suffix", "[suffix]"),
    "draft_model": ("draft_model",),
    "eagle": ("eagle",),
    "eagle3": ("eagle3",),
    "mtp": ("mtp", "deepseek_mtp", "glm4_moe_mtp", "qwen3_next_mtp"),
}
#: those that draft with layers of their own, and keep what these make of each token
WITH_LAYERS = ("draft_model", "eagle", "eagle3", "mtp")
#: vLLM's others, which are still to come
TO_COME = ("medusa", "mlp_speculator", "extract_hidden_states", "dflash", "dspark")
#: most drafts of a step, vLLM's bound
MOST_DRAFTS = 128
#: of the runs of tokens that "ngram" looks for, where neither bound is given; vLLM's
DEFAULT_LOOKUP = 5
#: vLLM's, of suffix decoding
SUFFIX_DEFAULTS = {
    "suffix_decoding_max_tree_depth": 24,
    "suffix_decoding_max_cached_requests": 10_000,
    "suffix_decoding_max_spec_factor": 1.0,
    "suffix_decoding_min_token_prob": 0.1,
}
#: fields of one method alone; those of "draft_model" of all `WITH_LAYERS`
OF_METHOD = {
    "ngram": ("prompt_lookup_max", "prompt_lookup_min"),
    "suffix": tuple(SUFFIX_DEFAULTS),
    "draft_model": ("draft_tensor_parallel_size", "max_model_len", "quantization", "revision", "draft_sample_method"),
}
#: vLLM's arguments of an engine, of several times -> the field that each of them is
ENGINE_ARGUMENTS = {
    "speculative_model": "model",
    "spec_model": "model",
    "spec_method": "method",
    "num_speculative_tokens": "num_speculative_tokens",
    "spec_tokens": "num_speculative_tokens",
    "ngram_prompt_lookup_max": "prompt_lookup_max",
    "ngram_prompt_lookup_min": "prompt_lookup_min",
    "speculative_draft_tensor_parallel_size": "draft_tensor_parallel_size",
    "speculative_max_model_len": "max_model_len",
}
#: values of these that ask for nothing
INERT = {"num_speculative_tokens": (0,), "spec_tokens": (0,)}
#: in which form the engine's own model drafts for itself
OWN_DRAFT_QUANTIZATION = "int4"


def _method(name: str, value: Any) -> str:
    text = value.strip().lower() if isinstance(value, str) else ""
    for method, names in METHODS.items():
        if text in names:
            return method
    if text in TO_COME or text.endswith("_mtp"):
        raise ValidationError(
            f"{name}={value!r} is {not_built('this kind of draft')}. Pass 'ngram' or 'suffix', which need no model."
        )
    raise ValidationError(f"{name} must be one of {', '.join(METHODS)}; got {value!r}.")


def _method_of(model: str) -> str:
    """What a model is for that is named without a method, by its name, as in vLLM. Its files may say otherwise, once
    they are there (`models.eagle.draft_method`).
    """
    name = model.strip().lower()
    if name in METHODS["ngram"] or name in METHODS["suffix"]:
        # older scripts name the method where others name a model
        return name
    return "eagle3" if "eagle3" in name else "eagle" if "eagle-" in name else "draft_model"


_factor = check.such_that(real, lambda factor: factor > 0, "be more than 0")
_probability = check.such_that(real, lambda share: 0 <= share <= 1, "be between 0 and 1")
_drafts = check.such_that(
    check.at_least(1), lambda number: number <= MOST_DRAFTS, f"be at most {MOST_DRAFTS}, the drafts of a step"
)


def _by_batch_size(name: str, value: Any) -> tuple[tuple[int, int, int], ...]:
    """(first, last, drafts) of ranges of batch sizes, ascending: vLLM's lists of three, or ``{"1-4": 5}``."""
    form = f"{name} must be a list of [first batch size, last one, drafts], such as [[1, 4, 5], [5, 16, 2]]"
    entries = value
    if isinstance(value, Mapping):
        entries = [(*str(key).split("-", 1), drafts) for key, drafts in value.items()]
    ranges: list[tuple[int, int, int]] = []
    try:
        for first, last, drafts in entries:
            ranges.append((int(first), int(last), int(drafts)))
    except (TypeError, ValueError):
        raise ValidationError(f"{form}; got {value!r}.") from None
    before = 0
    for first, last, drafts in ranges:
        if not before < first <= last or drafts < 0:
            raise ValidationError(
                f"{form}, each range behind the one before, no drafts below 0; got {[first, last, drafts]}."
            )
        before = last
    if not ranges:
        raise ValidationError(f"{form}; got {value!r}. Leave it out for the same number at every size.")
    return tuple(ranges)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig(Arguments):
    """vLLM's ``speculative_config``."""

    NAME = "speculative_config.{}"

    #: whether nobody said who drafts, and `method` goes by the model's name
    is_guess: ClassVar[bool] = False

    #: None: as `model` says
    method: str | None = argument(None, _method, "who drafts")
    model: str | None = argument(None, check.path_text, "the model that drafts, where the method needs one")
    num_speculative_tokens: int | None = argument(None, _drafts, "tokens that are drafted at once")
    prompt_lookup_max: int | None = argument(None, check.at_least(1), "longest run of tokens that ngram looks for")
    prompt_lookup_min: int | None = argument(None, check.at_least(1), "the shortest")
    suffix_decoding_max_tree_depth: int | None = argument(
        None, check.at_least(1), "longest run of tokens that suffix looks for"
    )
    suffix_decoding_max_cached_requests: int | None = argument(
        None, check.at_least(0), "most earlier requests whose outputs suffix looks through"
    )
    suffix_decoding_max_spec_factor: float | None = argument(
        None, _factor, "drafts of suffix for each token of the run that it has found"
    )
    suffix_decoding_min_token_prob: float | None = argument(
        None, _probability, "how frequent a draft of suffix has to be where the run was found"
    )
    draft_tensor_parallel_size: int | None = argument(
        None, check.at_least(1), "devices that the drafting model is split over: as many as the engine's"
    )
    max_model_len: int | None = argument(
        None, check.at_least(1), "tokens of the longest sequence that a model drafts for"
    )
    quantization: str | None = argument(None, weight_method, "of the drafting model, as the engine's")
    revision: str | None = argument(None, check.text, "of the drafting model on the hub")
    use_heterogeneous_vocab: bool = not_yet(False, "models of another vocabulary that draft")
    #: (first, last, drafts) of ranges of numbers of running requests
    num_speculative_tokens_per_batch_size: tuple[tuple[int, int, int], ...] | None = argument(
        None, _by_batch_size, "most drafts by the number of running requests"
    )
    rejection_sample_method: str = not_yet("standard", "another rule of acceptance")
    #: None: "probabilistic"
    draft_sample_method: str | None = argument(
        None,
        check.one_of("greedy", "probabilistic"),
        "what a model drafts: its most likely tokens, or what the request would sample of it; the tokens that come out "
        "are the same",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method is None:
            if self.model is None:
                raise ValidationError(
                    "speculative_config.method is missing: it says who drafts. Pass {'method': 'ngram', "
                    "'num_speculative_tokens': 5}, or spec_method='ngram' (--spec-method ngram), for example."
                )
            object.__setattr__(self, "method", _method("speculative_config.method", _method_of(self.model)))
            object.__setattr__(self, "is_guess", True)
        for method, names in OF_METHOD.items():
            # vLLM's default, which says nothing of tokens that no model drafts
            nothing = None, "greedy"
            own = self.method if method != "draft_model" or self.method not in WITH_LAYERS else method
            given = [name for name in names if method != own and getattr(self, name) not in nothing]
            if given:
                raise ValidationError(
                    f"speculative_config.{given[0]}={getattr(self, given[0])!r} is of method {method!r}, and method is "
                    f"{self.method!r}. Leave it out."
                )
        if (
            self.method in ("ngram", "suffix")
            and (self.model or self.method).strip().lower() not in METHODS[self.method]
        ):
            raise ValidationError(
                f"speculative_config.model={self.model!r} is of methods that need a model, and method is "
                f"{self.method!r}. Leave one of them out."
            )
        for name, default in SUFFIX_DEFAULTS.items():
            if self.method == "suffix" and getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.method == "suffix" and self.num_speculative_tokens is None:
            # as vLLM does
            most = min(self.suffix_decoding_max_tree_depth or 1, MOST_DRAFTS)
            object.__setattr__(self, "num_speculative_tokens", most)
        if self.method == "mtp" and self.num_speculative_tokens is None:
            object.__setattr__(self, "num_speculative_tokens", 1)
        if self.method in ("eagle", "eagle3") and self.model is None:
            raise ValidationError(
                f"speculative_config.model is missing: it is the folder of the head, with method={self.method!r}."
            )
        if self.num_speculative_tokens is None:
            raise ValidationError(
                "speculative_config.num_speculative_tokens is missing: it says how many tokens are drafted at once. "
                "Pass 5, for example."
            )
        by_size = self.num_speculative_tokens_per_batch_size or ()
        if (most := max((drafts for _, _, drafts in by_size), default=0)) > self.num_speculative_tokens:
            raise ValidationError(
                f"speculative_config.num_speculative_tokens_per_batch_size has {most} drafts, and "
                f"num_speculative_tokens={self.num_speculative_tokens} is the most of any step. Raise that to {most}, "
                "or give fewer."
            )
        if self.method == "ngram":
            self._bound_lookup()

    def _bound_lookup(self) -> None:
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        low, high = low or high or DEFAULT_LOOKUP, high or low or DEFAULT_LOOKUP
        if low > high:
            raise ValidationError(
                f"speculative_config.prompt_lookup_min ({low}) is more than prompt_lookup_max ({high}). Set "
                f"prompt_lookup_min to at most {high}."
            )
        object.__setattr__(self, "prompt_lookup_min", low)
        object.__setattr__(self, "prompt_lookup_max", high)

    @property
    def has_layers(self) -> bool:
        """Whether layers draft that keep what they make of each token."""
        return self.method in WITH_LAYERS

    def drafts_of(self, num_seqs: int) -> int:
        """Most drafts while so many requests run; where no range has it, those of the range before."""
        drafts = self.num_speculative_tokens
        assert drafts is not None
        for first, _, most in self.num_speculative_tokens_per_batch_size or ():
            if first <= num_seqs:
                drafts = most
        return drafts


def speculative(name: str, value: Any) -> SpeculativeConfig | None:
    """A `SpeculativeConfig`, or a mapping with its fields; nothing in it: None."""
    if isinstance(value, Mapping) and not value:
        return None
    return check.fields_of(SpeculativeConfig)(name, value)


def gathered(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` with those of `ENGINE_ARGUMENTS` as fields of ``speculative_config``.

    Raises:
        ValidationError: one thing is said twice, in two ways.
    """
    found = {name: value for name, value in arguments.items() if name in ENGINE_ARGUMENTS}
    rest = {name: value for name, value in arguments.items() if name not in ENGINE_ARGUMENTS}
    found = {name: value for name, value in found.items() if value is not None}
    config = rest.get("speculative_config")
    none = [name for name, value in found.items() if value in INERT.get(name, ())]
    if none:
        others = [name for name in found if name not in none] + ["speculative_config"] * bool(config)
        if others:
            raise ValidationError(
                f"{none[0]}={found[none[0]]!r} asks for no drafts, and {others[0]} for some. Leave {others[0]} out as "
                f"well, or set {none[0]} to at least 1."
            )
        found = {}
    if not found or isinstance(config, SpeculativeConfig):
        if found:
            raise ValidationError(f"speculative_config and {next(iter(found))} are two ways to say one thing; use one.")
        return rest
    fields: dict[str, Any] = check.mapping("speculative_config", config) if config else {}
    for name, value in found.items():
        if fields.setdefault(ENGINE_ARGUMENTS[name], value) != value:
            raise ValidationError(
                f"{name}={value!r} contradicts {fields[ENGINE_ARGUMENTS[name]]!r}, which speculative_config or another "
                "argument says. Use one of them."
            )
    return {**rest, "speculative_config": fields}

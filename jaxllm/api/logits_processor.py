"""A user's own part of the sampler: a jax function that every compiled step runs (`LLM(logits_processors=[...])`)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxllm.aliases import JAX_PROCESSOR
from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.api.torch_logits_processor import REQUEST, HostProcessor, is_vllms

_FORM = (
    "a jax function (logits, state) -> logits, its 'module:name', jaxllm.LogitsProcessor(function, extra_args), or a "
    "class of vLLM's for torch"
)
FLOAT32_MAX = 3.4028234663852886e38


@dataclasses.dataclass(frozen=True, eq=False)
class LogitsProcessor:
    """A function over logits, and the numbers that requests may give it.

    The function is called as ``function(logits, state)`` while the sampler is compiled, and runs on the device for
    every token of every request, greedy ones included: after allowed tokens, bad words and logit bias, before the
    penalties, as vLLM's. What `logprobs` reports is from before it, unless ``logprobs_mode`` is a "processed" one.

    Args:
        function: takes logits float32 [R, V] of R rows over V tokens and a `jaxllm.sampling.processors.LogitsState`,
            returns new logits float32 [R, V]. It must be made of jax operations, and a row's result must not depend
            on the other rows: which requests meet in a step, and how large R is, is the scheduler's choice.
        extra_args: name -> default. A request's value comes from ``SamplingParams.extra_args`` and reaches the function
            as ``state.extra_args[name]``, float32 [R].

    Raises:
        ValidationError: `function` cannot be called, or `extra_args` are not names with finite numbers.

    Example:
        >>> def no_repeats(logits, state):  # lower the token before last, as strongly as the request wants
        ...     rows = jnp.arange(len(logits))
        ...     before_last = state.tokens[rows, jnp.maximum(state.length - 2, 0)]
        ...     return logits.at[rows, before_last].add(-state.extra_args["strength"])
        >>> llm = LLM(model, logits_processors=[LogitsProcessor(no_repeats, extra_args={"strength": 0.0})])
        >>> llm.generate(prompt, SamplingParams(extra_args={"strength": 5.0}))
    """

    function: Callable[[Any, Any], Any]
    extra_args: Mapping[str, float] = dataclasses.field(default_factory=dict)
    #: a class of vLLM's that is called on the host, which the function is then
    host: HostProcessor | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_function("LogitsProcessor's function", self.function)
        if not isinstance(self.extra_args, Mapping):
            raise ValidationError(
                f"LogitsProcessor's extra_args must map names to default numbers, got {self.extra_args!r:.80} of type "
                f"{type(self.extra_args).__name__}."
            )
        checked: dict[str, float] = {}
        for name, default in self.extra_args.items():
            if not isinstance(name, str):
                raise ValidationError(f"LogitsProcessor's extra_args must have names as keys, got {name!r}.")
            checked[name] = float32(f"LogitsProcessor's extra_args[{name!r}]", default)
        object.__setattr__(self, "extra_args", checked)

    @property
    def name(self) -> str:
        if self.host is not None:
            return self.host.name
        return getattr(self.function, "__qualname__", None) or repr(self.function)


def logits_processors(name: str, value: Any) -> tuple[LogitsProcessor, ...]:
    """The processors that a list of functions, ``module:name`` strings, `LogitsProcessor`s and vLLM's classes stands
    for.

    Raises:
        ValidationError: an entry is none of these, cannot be imported, or two give one extra argument different
            defaults.
    """
    found = tuple(_processor(f"{name}[{i}]", entry) for i, entry in enumerate(checks.items(name, value)))
    extra_arg_defaults(found)
    return found


def extra_arg_defaults(processors: Iterable[LogitsProcessor]) -> dict[str, float]:
    """Name -> default of all extra arguments, in the order in which the device holds them.

    Raises:
        ValidationError: two processors want different defaults for one name.
    """
    defaults: dict[str, float] = {}
    for processor in processors:
        for name, default in processor.extra_args.items():
            if defaults.setdefault(name, default) != default:
                raise ValidationError(
                    f"two logits_processors declare the extra argument {name!r}, with defaults {defaults[name]} and "
                    f"{default}; give them one default or two names."
                )
    return defaults


def hosts(processors: Iterable[LogitsProcessor]) -> tuple[HostProcessor, ...]:
    """Those that are called on the host."""
    return tuple(processor.host for processor in processors if processor.host is not None)


def float32(name: str, value: Any) -> float:
    """`value` as a finite float that float32 can hold."""
    number = checks.real(name, value)
    if abs(number) > FLOAT32_MAX:
        raise ValidationError(f"{name} must fit float32 (at most {FLOAT32_MAX:.4g}), got {number}.")
    return number


def _processor(name: str, entry: Any) -> LogitsProcessor:
    if isinstance(entry, str):
        name, entry = f"{name}={entry!r}", _imported(name, entry)
    if isinstance(entry, LogitsProcessor):
        return entry
    if is_vllms(entry):
        host: Any = HostProcessor(entry)
        return LogitsProcessor(host, extra_args={REQUEST: 0}, host=host)
    _check_function(name, entry)
    return LogitsProcessor(entry)


def _imported(name: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ValidationError(f"{name} must be {_FORM}; got {path!r}.")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValidationError(f"{name}={path!r} cannot be imported: {error}.") from error
    return found


def _check_function(name: str, entry: Any) -> None:
    if inspect.isclass(entry):
        raise ValidationError(
            f"{name} is the class {entry.__name__}, without the methods apply and update_state of vLLM's "
            f"(jaxllm.v1.sample.logits_processor), and processors run inside the compiled step. Pass {_FORM}; "
            f"per-request numbers are in extra_args: {JAX_PROCESSOR}."
        )
    if not callable(entry):
        raise ValidationError(f"{name} must be {_FORM}; got {entry!r:.80} of type {type(entry).__name__}.")
    if _takes_torch(entry):
        raise ValidationError(
            f"{name} takes {inspect.signature(entry)}, which is vLLM's form for torch tensors, but processors run "
            f"inside the compiled step. Pass {_FORM}: {JAX_PROCESSOR}."
        )


def _takes_torch(function: Callable[..., Any]) -> bool:
    """Whether a function says that it takes torch tensors, or token ids before the logits as vLLM's do."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    if any(re.search(r"\b(torch|Tensor)\b", str(parameter.annotation)) for parameter in parameters):
        return True
    return any(parameter.name == "logits" for parameter in parameters[1:])

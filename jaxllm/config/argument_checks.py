"""What the engine's arguments may be, and the forms that their values are brought into.

Each check takes an argument's name and value, and returns the value in the type of its field or raises ValidationError.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.config.argument import argument
from jaxllm.config.arguments import VLLM_ATTENTION_BACKENDS

#: `max_model_len` that asks for the longest one that fits into memory
FIT_TO_MEMORY = -1

ATTENTION_BACKENDS = ("auto", "xla", "triton", "mosaic")
DTYPES = ("float32", "bfloat16", "float16")
#: more running requests than a device has memory for: token ids alone, of requests of 131,072 tokens, are 34 GB
MOST_SEQS = 2**16

_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
#: of bytes, by the prefix in small letters, as IEC 80000-13 has them
_BYTES = {"": 1, **{p: 1000**n for n, p in enumerate("kmgt", 1)}, **{f"{p}i": 1024**n for n, p in enumerate("kmgt", 1)}}


def count(name: str, value: Any, such_as: str = "8192, '8K' or '25.6k'") -> int:
    """A whole number, or a string with one: 1k is 1000 and 1K is 1024 (likewise m, g).

    Args:
        such_as: examples for the error.
    """
    if not isinstance(value, str):
        return checks.integer(name, value)
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", value.strip())
    # exact: in floats, 1.001k and its like would not be whole
    number = Fraction(match[1]) * _MULTIPLES[match[2]] if match else Fraction(1, 2)
    if number.denominator != 1:
        raise ValidationError(f"{name} must be a whole number such as {such_as}, got {value!r}.")
    return int(number)


def size(name: str, value: Any) -> int:
    """Bytes: a whole number, or a string. 4GB is 4 * 10^9 and 4GiB is 4 * 2^30; without the B it is a `count`, in which
    4g is 10^9 and 4G is 2^30.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b|[kmgt]i)", value.strip().lower())
        if match and (unit := match[2].removesuffix("b")) in _BYTES:
            return int(Fraction(match[1]) * _BYTES[unit])
    try:
        return count(name, value)
    except ValidationError:
        raise ValidationError(
            f"{name} must be a number of bytes such as 4294967296, '4GiB' or '500MB', got {value!r}."
        ) from None


def gibibytes(name: str, value: Any) -> float:
    """GiB: a number of them, or a string with one or with bytes (`size`), such as 500MB."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                value = size(name, value) / 2**30
            except ValidationError:
                raise ValidationError(
                    f"{name} must be a number of GiB such as 4 or 0.5, or a size such as '500MB', got {value!r}."
                ) from None
    number = checks.real(name, value)
    if number < 0:
        raise ValidationError(f"{name} must be at least 0 GiB, got {number}.")
    return number


def such_that(read: Callable[[str, Any], Any], holds: Callable[[Any], bool], wanted: str) -> Callable[[str, Any], Any]:
    """What `read` makes of a value, where it `holds`; the error says that the argument must `wanted`."""

    def check(name: str, value: Any) -> Any:
        number = read(name, value)
        if not holds(number):
            raise ValidationError(f"{name} must {wanted}, got {number}.")
        return number

    return check


def at_least(least: int, read: Callable[[str, Any], int] = count) -> Callable[[str, Any], int]:
    return such_that(read, lambda number: number >= least, f"be at least {least}")


devices = functools.partial(count, such_as="1, 2 or 4")
block_size = such_that(
    functools.partial(count, such_as="16 or 64"),
    lambda number: number in (8, 16, 32, 64, 128),
    "be 8, 16, 32, 64 or 128 tokens",
)
share = such_that(checks.real, lambda number: 0 < number <= 1, "be in (0, 1]")
max_logprobs = such_that(checks.integer, lambda number: number >= -1, "be at least 0, or -1 for the whole vocabulary")
seed = such_that(checks.integer, lambda number: -(2**63) <= number < 2**64, "fit 64 bits")
port = such_that(checks.integer, lambda number: 0 <= number < 2**16, "be a TCP port, 0 (any free one) to 65535")


def max_num_seqs(name: str, value: Any) -> int:
    number = at_least(1)(name, value)
    if number > MOST_SEQS:
        raise ValidationError(
            f"{name} must be at most {MOST_SEQS}, got {number}: every request that can run at once takes rows of its "
            "own in each step and on the device. Requests beyond it wait, however many there are; 256 to 1024 keep a "
            "large GPU busy."
        )
    return number


def max_model_len(name: str, value: Any) -> int:
    if isinstance(value, str) and value.strip().lower() == "auto":
        return FIT_TO_MEMORY
    number = count(name, value)
    if number < 1 and number != FIT_TO_MEMORY:
        raise ValidationError(f"{name} must be at least 1, or -1 (or 'auto') for what fits in memory, got {number}.")
    return number


def text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValidationError(f"{name} must be a non-empty string, got {value!r} of type {type(value).__name__}.")
    return value


def place(name: str, value: Any) -> str | os.PathLike[str]:
    if isinstance(value, os.PathLike) and isinstance(os.fspath(value), str):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValidationError(f"{name} must be a name or a path, got {value!r} of type {type(value).__name__}.")
    return value


def path_text(name: str, value: Any) -> str:
    return os.fspath(place(name, value))


def token(name: str, value: Any) -> str | bool:
    return value if isinstance(value, bool) else text(name, value)


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        hint = ", which is no JSON object" if isinstance(value, str) else ""
        raise ValidationError(
            f"{name} must be a dict with string keys, got {value!r} of type {type(value).__name__}{hint}."
        )
    return dict(value)


class OneOf:
    """One of `choices`, in whatever case; `others` are further names of some of them."""

    def __init__(self, *choices: str, **others: str):
        self.choices = choices
        self._known = {choice: choice for choice in choices} | others

    def __call__(self, name: str, value: Any) -> str:
        choice = self._known.get(value.strip().lower()) if isinstance(value, str) else None
        if choice is None:
            raise ValidationError(f"{name} must be one of {', '.join(self._known)}; got {value!r}.")
        return choice


def one_of(*choices: str, **others: str) -> OneOf:
    return OneOf(*choices, **others)


def attention_backend(name: str, value: Any) -> str:
    backend = text(name, value).strip()
    if backend.upper() in VLLM_ATTENTION_BACKENDS:
        return "auto"
    if backend.lower() not in ATTENTION_BACKENDS:
        raise ValidationError(
            f"{name} must be one of {', '.join(ATTENTION_BACKENDS)}, or a name of vLLM's own such as FLASH_ATTN, "
            f"FLASHINFER or TRITON_ATTN, which mean auto; got {value!r}."
        )
    return backend.lower()


def layer_partition(name: str, value: Any) -> tuple[int, ...]:
    """Layers of each stage of a pipeline: numbers, or a string such as "5,3"."""
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not given:
        raise ValidationError(f"{name} must be the layers of each stage, such as '5,3' or (5, 3), got {value!r}.")
    return tuple(at_least(1)(name, number) for number in given)


def fields_of(kind: type) -> Callable[[str, Any], Any]:
    """An instance of a dataclass, or a mapping with its fields."""
    names = [field.name for field in dataclasses.fields(kind)]

    def check(name: str, value: Any) -> Any:
        if isinstance(value, kind):
            return value
        given = mapping(name, value)
        # what asks for nothing may be there as well
        wrong = next((key for key in given if key not in names and given[key]), None)
        if wrong is not None:
            close = difflib.get_close_matches(wrong, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValidationError(f"{name} has no field {wrong!r}; its fields are {', '.join(names)}.{hint}")
        return kind(**{key: given[key] for key in names if given.get(key) is not None})

    return check


def dtype(name: str, value: Any) -> str:
    # numpy, jax.numpy and torch each print theirs in another way; none of them is imported here
    if not isinstance(value, str):
        value = getattr(value, "name", None) or getattr(value, "__name__", None) or str(value).removeprefix("torch.")
    try:
        return one_of("auto", *DTYPES, float="float32", half="float16")(name, value)
    except ValidationError as error:
        meant = re.sub(r"^(b?)fp?(?=\d)", r"\1float", value.strip().lower())
        if meant not in DTYPES:
            raise
        raise ValidationError(f"{error} Did you mean {meant!r}?") from None


def part(kind: type, help: str, *, group: str = "engine") -> Any:
    """An `argument` that is a configuration of its own, or a dict of its fields."""
    return argument(kind, fields_of(kind), help, group=group, form="JSON")

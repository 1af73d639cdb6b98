"""Checks of values that a caller gave. Each returns the value as a plain Python one, or raises `ValidationError`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from jaxllm.api.errors import ValidationError


def integer(name: str, value: Any) -> int:
    """`value` as an int. NumPy's integers pass; booleans and floats do not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValidationError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    return int(value)


def real(name: str, value: Any) -> float:
    """`value` as a finite float. NumPy's scalars pass; booleans, NaN and infinities do not."""
    number = real_or_infinite(name, value)
    if math.isinf(number):
        raise ValidationError(f"{name} must be a finite number, got {number}.")
    return number


def real_or_infinite(name: str, value: Any) -> float:
    """As `real`, with infinities allowed."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValidationError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:
        raise ValidationError(f"{name} must fit a float, got a number beyond 1.8e308.") from None
    if math.isnan(number):
        raise ValidationError(f"{name} must be a finite number, got nan.")
    return number


def boolean(name: str, value: Any) -> bool:
    """`value` as a bool; 0 and 1 are not taken for one."""
    # NumPy's own boolean is not a subclass of bool, and this module does not import NumPy to name it.
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise ValidationError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}.")


def function(name: str, value: Any) -> Any:
    """`value`, which can be called."""
    if not callable(value):
        raise ValidationError(f"{name} must be a function, got {value!r} of type {type(value).__name__}.")
    return value


def items(name: str, value: Any) -> list[Any]:
    """`value` as a list; strings, bytes and mappings do not count as lists."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValidationError(f"{name} must be a list, got {value!r} of type {type(value).__name__}.")
    return list(value)


def token_ids(name: str, value: Any) -> list[int]:
    """`value` as a list of non-negative ints."""
    ids = []
    for item in items(name, value):
        if isinstance(item, bool) or not isinstance(item, numbers.Integral):
            raise ValidationError(f"{name} must contain only integers, got {item!r} of type {type(item).__name__}.")
        if item < 0:
            raise ValidationError(f"{name} must contain token ids, which start at 0, got {int(item)}.")
        ids.append(int(item))
    return ids


def strings(name: str, value: Any) -> list[str]:
    """`value` as a list of non-empty strings; one string counts as a list of one."""
    texts = [value] if isinstance(value, str) else items(name, value)
    for text in texts:
        if not isinstance(text, str):
            raise ValidationError(f"{name} must contain only strings, got {text!r} of type {type(text).__name__}.")
        if not text:
            raise ValidationError(f"{name} cannot contain an empty string.")
    return texts


def refuse(**arguments: Any) -> None:
    """Refuse what later capabilities will take."""
    for name, value in arguments.items():
        if value:
            raise ValidationError(f"{name} is not supported yet")


def no_table(name: str, value: Any, *, give: str = "{column}") -> None:
    """Refuse a DataFrame, of pandas or polars: what it holds one after the other is the names of its columns, or whole
    columns.

    Args:
        give: what to give in its place, made of one column, which stands for ``{column}``.
    """
    if isinstance(value, (str, list, tuple, Mapping)) or not hasattr(type(value), "columns") or callable(value.columns):
        return
    names = list(value.columns)
    # most often the first column of texts holds what was meant
    best = next((column for column in names if isinstance(next(iter(value[column]), None), str)), "name")
    raise ValidationError(
        f"{name} is a {type(value).__name__}: give one of its columns, such as {give.format(column=f'df[{best!r}]')}. "
        f"Its columns are {', '.join(map(repr, names)) or 'none'}."
    )


def is_column(value: Any) -> bool:
    """Whether `value` is a column of a table (a Series of pandas or polars), not a list or an array of numbers."""
    return hasattr(value, "dtype") and hasattr(value, "name")

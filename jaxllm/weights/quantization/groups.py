"""Groups of columns that share a scale (``group_size``): what config.json says of them, and what the tensors have.

A config without the field has groups of 128, as transformers reads it; -1 is one group a row; one that is larger than a
row is the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.quantization.method import StoredTensors, needs

DEFAULT = 128


def group_size(config: Mapping[str, Any], default: int = DEFAULT) -> int:
    """Of a quantization_config, or of a rule in it. Raises ValidationError where it is no integer."""
    value = config.get("group_size", config.get("q_group_size", default))
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise ValidationError(
        f"quantization_config of config.json says group_size={value!r}; it must be a number of columns, or -1 for all "
        "of a row. Correct it there."
    )


def planned_group(said: int, name: str, columns: int) -> int:
    """Columns of a group, by the configuration alone.

    Args:
        said: the configuration's group size.
        name: of the matrix.

    Raises:
        ValidationError: the matrix has no such groups.
    """
    if said == -1 or said > columns:
        return columns
    if said < 1 or columns % said or said % 2:
        raise ValidationError(
            f"quantization_config of config.json says group_size={said}, and {name} has {columns} columns, which are "
            "no such groups of an even number. Correct it there."
        )
    return said


def stored_group(tensors: StoredTensors, module: str, columns: int, rows: int, said: int) -> int:
    """Columns of a group, by a matrix's ``qweight`` and ``scales`` [groups, rows].

    Args:
        columns: by qweight.
        rows: by qweight.
        said: the configuration's group size.

    Raises:
        WeightsError: the two contradict each other, or what the configuration says.
    """
    groups, scaled = needs(tensors, f"{module}.scales", (None, None))
    names = f"{module}.qweight", f"{module}.scales"
    both = " and ".join(f"tensor {name!r} has shape {tensors.shape(name)}" for name in names)
    if scaled != rows:
        raise WeightsError(f"{both}: by the first the matrix has {rows} rows, by the second {scaled}")
    says = f"and quantization_config of config.json says group_size={said}"
    if not groups or columns % groups or columns // groups % 2:
        raise WeightsError(
            f"{both}: {groups} groups, which do not divide the matrix's {columns} columns into groups of an even "
            f"number, {says}"
        )
    size = columns // groups
    if size == said or (groups == 1 and (said == -1 or said > columns)):
        return size
    is_partial = said > 0 and groups == -(-columns // said)
    rest = " (the last group would not be full, which cannot be read)" if is_partial else ""
    raise WeightsError(
        f"{both}: {groups} groups of {size} of the matrix's {columns} columns, {says}{rest}. Correct it there; or, if "
        "the tensors are damaged, take another copy."
    )

"""Quantized matrices whose arrays are kept as an engine had them (orbax): their layouts, as JSON beside them.

What a checkpoint's own configuration says of a matrix follows from its tensors, which such a directory has not.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers import weight_storage
from jaxllm.layers.weight_storage import Layout
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.quantization.detect import ALIASES, Quantization
from jaxllm.weights.quantization.method import Found, Method, StoredTensors

FILE = "quantized_matrices.json"
_LAYOUTS = {
    kind.__name__: kind
    for kind in (
        weight_storage.Int4Layout,
        weight_storage.ScaledLayout,
        weight_storage.CodebookLayout,
        weight_storage.BlockLayout,
        weight_storage.ReorderedLayout,
        weight_storage.RoundedInputsLayout,
    )
}


class Kept(Method):
    """Of a directory that has `FILE`."""

    tensors = ()
    markers = ()

    def __init__(self, name: str):
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]

    def look(self, tensors: StoredTensors, module: str) -> Found:
        raise AssertionError("arrays are read as they are")

    def planned(self, name: str, shape: tuple[int, int]) -> Layout | None:
        raise AssertionError("a file says it")

    def array(
        self, tensors: StoredTensors, name: str, found: Found, kind: str, rows: slice, within: int | None
    ) -> np.ndarray:
        raise AssertionError("arrays are read as they are")


def write_kept(directory: Path, quantization: Quantization) -> None:
    """Write `FILE`."""
    layouts = list(dict.fromkeys(found.layout for found in quantization.matrices.values()))
    matrices = {name: [layouts.index(f.layout), *f.shape, f.stacked] for name, f in quantization.matrices.items()}
    content = {"method": quantization.method.name, "layouts": list(map(_plain, layouts)), "matrices": matrices}
    (directory / FILE).write_text(json.dumps(content))


def read_kept(directory: Path, asked: str | None) -> Quantization | None:
    """What `write_kept` wrote; None: nothing.

    Args:
        asked: the engine's `quantization`.

    Raises:
        WeightsError: it is not readable.
        ValidationError: something else is asked for.
    """
    try:
        content: Any = json.loads((directory / FILE).read_text())
        layouts = [_layout(fields) for fields in content["layouts"]]
        matrices = {
            name: Found(layouts[index], (rows, columns), stacked)
            for name, (index, rows, columns, stacked) in content["matrices"].items()
        }
        method = Kept(content["method"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise WeightsError(f"{directory / FILE}: not readable: {error!r}") from error
    if asked is not None and ALIASES.get(asked, asked) != method.name:
        raise ValidationError(
            f"quantization={asked!r}, but the checkpoint is quantized by {method.name!r} ({FILE}). Leave quantization "
            "out, or take another checkpoint."
        )
    return Quantization(method, matrices)


def _plain(layout: Any) -> dict[str, Any]:
    fields = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    if "layout" in fields:
        fields["layout"] = _plain(fields["layout"])
    return {"type": type(layout).__name__, **fields}


def _layout(fields: dict[str, Any]) -> Layout:
    own: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items() if name != "type"
    }
    if "layout" in own:
        own["layout"] = _layout(own["layout"])
    return _LAYOUTS[fields["type"]](**own)

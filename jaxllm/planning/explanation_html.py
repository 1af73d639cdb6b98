"""An explanation as a notebook shows it: the devices of the mesh, and in each of them what it has of every array."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from jaxllm.parallel.mesh import STAGE
from jaxllm.planning.layout import KV_CACHE, KV_SCALES, ArrayLayout

if TYPE_CHECKING:
    from jaxllm.planning.explanation import Explanation

_WIDTH, _HEIGHT, _GAP, _TITLE = 88, 220, 8, 16
_GIB = 2**30
_CACHE, _ACTIVATIONS, _STATE = "#56B4E9", "#E69F00", "#CC79A7"
#: what an array is of, by a logical axis that it has, and the colour of it; the first that fits
_KINDS = (
    ("experts", "experts", "#F0E442"),
    ("whole experts", "experts", "#F0E442"),
    ("heads", "attention", "#0072B2"),
    ("kv_heads", "attention", "#0072B2"),
    ("mlp", "MLP", "#009E73"),
    ("vocab", "embedding and head", "#D55E00"),
)
_OTHERS = "the rest of the weights", "#999999"


def explanation_html(explanation: Explanation) -> str:
    """A column for each device, as high as its memory, with what lies in it in proportion; all else as text."""
    legend: dict[str, str] = {}
    columns = [list(_column(explanation, numbers, legend)) for numbers in _places(explanation.mesh)]
    per_row = list(explanation.mesh.values())[-1] if explanation.mesh else 1
    rows = -(-len(columns) // per_row)
    width, height = per_row * (_WIDTH + _GAP), rows * (_HEIGHT + _TITLE + _GAP)
    shapes = []
    for i, (column, numbers) in enumerate(zip(columns, _places(explanation.mesh), strict=True)):
        x, y = i % per_row * (_WIDTH + _GAP), i // per_row * (_HEIGHT + _TITLE + _GAP)
        name = ", ".join(f"{axis} {number}" for axis, number in numbers.items())
        shapes.append(f'<text x="{x}" y="{y + _TITLE - 4}" font-size="11">{html.escape(name)}</text>')
        shapes += [_rectangle(x, y + _TITLE, *part) for part in column]
    entries = " ".join(
        f'<span><span style="color:{colour}">&#9632;</span> {html.escape(name)}</span>'
        for name, colour in legend.items()
    )
    return (
        f"<div><div>{html.escape(explanation.mesh_line())}</div>"
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg>'
        f"<div>{entries}</div><pre>{html.escape(str(explanation))}</pre></div>"
    )


def _places(mesh: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Of each device its number along each axis of the mesh, in the order of the devices."""
    for numbers in itertools.product(*map(range, mesh.values())):
        yield dict(zip(mesh, numbers, strict=True))


def _column(
    explanation: Explanation, numbers: Mapping[str, int], legend: dict[str, str]
) -> Iterator[tuple[float, float, str, str]]:
    """What lies on a device: (top, height, colour, words), in pixels."""
    memory, mesh = explanation.plan.memory, explanation.mesh
    parts = [
        (
            *_kind(each),
            each.device_bytes,
            f"{each.count} x " * (each.count > 1) + f"{each.name}: {each.part(mesh, numbers)}",
        )
        for each in explanation.layouts
        if each.stage is None or each.stage == numbers[STAGE]
    ]
    rest = "not used"
    if numbers.get(STAGE, memory.stage) == memory.stage:
        parts.append(("activations", _ACTIVATIONS, memory.activation_bytes, "activations"))
        parts.append(("state", _STATE, memory.state_bytes, "state"))
    else:  # the plan is of the stage that has the least room
        rest = "not used, but for activations and state"
    used = sum(size for _, _, size, _ in parts)
    whole = max(memory.total_bytes, used, 1)
    parts.append((rest, "#EEEEEE", whole - used, rest))
    top = 0.0
    # neighbours of one kind are beside each other
    order = list(dict.fromkeys(name for name, *_ in parts))
    for name, colour, size, words in sorted(parts, key=lambda part: order.index(part[0])):
        legend[name] = colour
        height = _HEIGHT * size / whole
        yield top, height, colour, f"{words} ({size / _GIB:.3f} GiB)"
        top += height


def _kind(layout: ArrayLayout) -> tuple[str, str]:
    if layout.name in (KV_CACHE, KV_SCALES):
        return KV_CACHE, _CACHE
    names = {name for joined in layout.axes for name, _ in joined}
    return next(((kind, colour) for axis, kind, colour in _KINDS if axis in names), _OTHERS)


def _rectangle(x: float, y: float, top: float, height: float, colour: str, words: str) -> str:
    return (
        f'<rect x="{x}" y="{y + top:.2f}" width="{_WIDTH}" height="{height:.2f}" fill="{colour}">'
        f"<title>{html.escape(words)}</title></rect>"
    )

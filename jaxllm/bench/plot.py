"""Benchmarks draw their sweeps and their requests, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.extras import how_to_install

#: (x, y) of one line
Points = list[tuple[float, float]]
SUFFIXES = (".png", ".svg", ".pdf")


def require(path: Path | None) -> None:
    """Raise ValidationError where a plot is wanted and cannot be drawn: before hours of measuring, not after."""
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise ValidationError(f"--plot draws a {', '.join(SUFFIXES)} file, which {str(path)!r} is not.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValidationError(f"--plot needs matplotlib: {how_to_install('plot')}.")


def draw(path: Path, lines: dict[str, Points], *, x: str, y: str) -> None:
    """Draw lines over a logarithmic axis into an image file, whose suffix says of which kind."""
    figure, axes = _figure()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({place for points in lines.values() for place, _ in points}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    _finish(path, figure, axes, x, y)


def draw_timeline(path: Path, requests: Sequence[Sequence[float]]) -> None:
    """Draw a line a request, from when it was sent: it waits for its first output, and then each output is a dot.

    Args:
        requests: when it was sent and when its outputs came, in seconds; at least one of each.
    """
    figure, axes = _figure()
    requests = sorted(requests, key=tuple)
    began = requests[0][0]
    rows = range(len(requests))
    axes.hlines(rows, [r[0] - began for r in requests], [r[1] - began for r in requests], "0.7", label="waiting")
    axes.hlines(rows, [r[1] - began for r in requests], [r[-1] - began for r in requests], label="answering")
    dots = [(time - began, row) for row, request in enumerate(requests) for time in request[1:]]
    axes.plot(*zip(*dots, strict=True), ".", color="k", markersize=1, label="output")
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    _finish(path, figure, axes, "seconds", "request")


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(path: Path, figure: Any, axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)

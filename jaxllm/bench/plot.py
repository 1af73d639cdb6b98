"""Benchmarks draw their sweeps, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({place for points in lines.values() for place, _ in points}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)

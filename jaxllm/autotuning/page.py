"""A result as one page of HTML: the Pareto front, the effect of each knob, the runs; with nothing from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxllm.autotuning.goals import seconds_text
from jaxllm.autotuning.knob import Knob
from jaxllm.autotuning.result import TuningResult, arguments_text, table_html
from jaxllm.autotuning.trials import Trial, key_of

_WIDTH, _HEIGHT, _LEFT, _BELOW, _ABOVE = 640, 360, 64, 40, 12
_SMALL = 300, 200
_TRIED, _MISSED, _FRONT, _BASE, _BEST, _MEASURED = "#9aa0a6", "#e3c3bd", "#0072B2", "#E69F00", "#009E73", "#000"
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #202124 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .75em; text-align: left;
border-bottom: 1px solid #dadce0; vertical-align: top } pre { background: #f6f8fa; padding: 1em; overflow: auto }
figure { display: inline-block; margin: .5em 1em .5em 0 } figcaption { font-weight: 600 }
"""


class Point(NamedTuple):
    """One mark of a plot."""

    x: float
    y: float
    colour: str
    radius: float
    text: str
    ring: bool = False


def page(result: TuningResult) -> str:
    """A file by itself."""
    title = html.escape(f"jaxllm tune: {result.model}")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1>{body(result)}</body></html>\n"
    )


def body(result: TuningResult) -> str:
    """What a notebook shows, too."""
    goals = result.goals
    parts = [f"<pre>{html.escape(str(result))}</pre>", "<h2>Throughput and latency</h2>", _front(result)]
    rows = []
    for effect in result.effects:
        rows.append(
            [effect.knob.name, effect.knob.shown(effect.value), f"{effect.knob.why}.", f"{effect.text(goals)}."]
        )
    if rows:
        parts += ["<h2>The best settings</h2>", table_html(["argument", "value", "why", "effect"], rows)]
    if result.finalists:
        parts += ["<h2>The best few</h2>", _finalists(result)]
    if result.space.knobs:
        plots = "".join(_effect(result, knob) for knob in result.space.knobs)
        parts += [
            "<h2>The effect of each knob</h2>",
            f"<p>Every simulated setting ({html.escape(goals.objective)} in {goals.unit}; pale: constraints missed). "
            "The line is the best of each value.</p>",
            plots,
        ]
    if result.space.left:
        parts += [
            "<h2>Not searched</h2>",
            table_html(["argument", "why"], [[name, why] for name, why in result.space.left.items()]),
        ]
    parts += ["<h2>For <code>--config</code></h2>", f"<pre>{html.escape(result.to_yaml())}</pre>"]
    return "\n".join(parts)


def _front(result: TuningResult) -> str:
    goals = result.goals
    points = []
    for trial in _simulated(result):
        missed = goals.excess(trial.numbers or {}) > 0
        points.append(_point(trial.numbers or {}, _MISSED if missed else _TRIED, 3, _told(result, trial)))
    front = result.front()
    line = [(each.numbers["e2e_p50"], each.numbers["throughput"]) for each in front]
    points += [_point(each.numbers, _FRONT, 4, arguments_text(each.arguments)) for each in front]
    for each in result.finalists:
        if each.measured:
            points.append(_point(each.numbers, _MEASURED, 6, f"measured: {arguments_text(each.arguments)}", ring=True))
    for each, colour, name in ((result.base, _BASE, "defaults"), (result.best, _BEST, "best")):
        if each.numbers:
            points.append(_point(each.numbers, colour, 6, f"{name}: {arguments_text(each.arguments)}"))
    legend = _legend(
        (_TRIED, "simulated"), (_MISSED, "constraints missed"), (_FRONT, "Pareto front"), (_BASE, "defaults"),
        (_BEST, "best"), *([(_MEASURED, "measured (rings)")] if result.is_measured else []),
    )  # fmt: skip
    plot = _plot(points, [line], "median seconds from arrival to the last token", "output tokens/s", (_WIDTH, _HEIGHT))
    return f"<figure>{plot}<div>{legend}</div></figure>"


def _effect(result: TuningResult, knob: Knob) -> str:
    """The objective against a knob's values, of all that was simulated."""
    goals, points, best = result.goals, [], {}
    for trial in _simulated(result):
        place = (
            knob.values.index(value)
            if (value := result.space.values(trial.arguments)[knob.name]) in knob.values
            else -1
        )
        if place < 0 or trial.numbers is None:
            continue
        missed = goals.excess(trial.numbers) > 0
        points.append(Point(place, goals.value(trial.numbers), _MISSED if missed else _TRIED, 3, _told(result, trial)))
        if place not in best or goals.rank(trial.numbers) < goals.rank(best[place]):
            best[place] = trial.numbers
    line = [(float(place), goals.value(best[place])) for place in sorted(best)]
    chosen = result.space.values(result.best.arguments)[knob.name]
    labels = [("* " if value == chosen else "") + knob.shown(value) for value in knob.values]
    plot = _plot(points, [line], "", f"{goals.objective}, {goals.unit}", _SMALL, labels=labels)
    return f"<figure><figcaption>{html.escape(knob.name)}</figcaption>{plot}</figure>"


def _finalists(result: TuningResult) -> str:
    goals, rows = result.goals, []
    problems = {trial.key: trial.problem for trial in result.trials if trial.problem}
    known = sorted((each for each in result.finalists if each.numbers), key=lambda one: goals.rank(one.numbers))
    for each in [*known, *(each for each in result.finalists if not each.numbers)]:
        measured = problems.get(key_of(each.arguments), "-")
        if each.measured:
            measured = f"{goals.text(each.numbers)} ({len(each.measured)} rounds)"
        simulated = goals.text(each.simulated) if each.simulated else "not simulated"
        gain = "-" if each.gain is None else each.gain.text()
        rows.append([arguments_text(each.arguments), measured, gain, simulated])
    heading = ["settings", "measured", "beside the defaults, in the same rounds (95%)", "simulated"]
    return table_html(heading, rows)


def _simulated(result: TuningResult) -> list[Trial]:
    return [trial for trial in result.trials if trial.kind == "simulated" and trial.numbers is not None]


def _told(result: TuningResult, trial: Trial) -> str:
    numbers = trial.numbers or {}
    return f"{arguments_text(trial.arguments)}: {result.goals.text(numbers)}"


def _point(numbers: Mapping[str, float], colour: str, radius: float, text: str, *, ring: bool = False) -> Point:
    return Point(numbers["e2e_p50"], numbers["throughput"], colour, radius, text, ring)


def _legend(*entries: tuple[str, str]) -> str:
    return " ".join(f'<span><span style="color:{colour}">&#9679;</span> {html.escape(name)}</span>'
                    for colour, name in entries)  # fmt: skip


def _plot(
    points: Sequence[Point],
    lines: Iterable[Sequence[tuple[float, float]]],
    x_title: str,
    y_title: str,
    size: tuple[int, int],
    *,
    labels: Sequence[str] | None = None,
) -> str:
    """Points and lines over two axes.

    Args:
        labels: of the x axis at 0, 1, ...; None: it has numbers.
    """
    width, height = size
    lowest, highest = _range([point.y for point in points], zero=True)
    first, last = (-0.5, len(labels) - 0.5) if labels else _range([point.x for point in points], zero=True)
    x = lambda value: _LEFT + (value - first) / (last - first) * (width - _LEFT - 10)  # noqa: E731
    y = lambda value: height - _BELOW - (value - lowest) / (highest - lowest) * (height - _BELOW - _ABOVE)  # noqa: E731
    shapes = [
        f'<line x1="{_LEFT}" y1="{height - _BELOW}" x2="{width}" y2="{height - _BELOW}" stroke="#5f6368"/>',
        f'<line x1="{_LEFT}" y1="{_ABOVE}" x2="{_LEFT}" y2="{height - _BELOW}" stroke="#5f6368"/>',
        f'<text x="{_LEFT}" y="{_ABOVE - 2}" font-size="10">{html.escape(y_title)}</text>',
        f'<text x="{width}" y="{height - 6}" font-size="11" text-anchor="end">{html.escape(x_title)}</text>',
    ]
    for tick in _ticks(lowest, highest):
        shapes.append(
            f'<line x1="{_LEFT}" y1="{y(tick):.1f}" x2="{width}" y2="{y(tick):.1f}" stroke="#eee"/>'
            f'<text x="{_LEFT - 4}" y="{y(tick) + 4:.1f}" font-size="11" text-anchor="end">{tick:g}</text>'
        )
    if labels:
        size_of = 11 if max(map(len, labels)) < 8 and len(labels) < 8 else 8
        for place, label in enumerate(labels):
            text = html.escape(label if len(label) < 14 else f"{label[:12]}..")
            shapes.append(
                f'<text x="{x(place):.1f}" y="{height - _BELOW + 14}" font-size="{size_of}" text-anchor="middle">{text}'
                f"<title>{html.escape(label)}</title></text>"
            )
    else:
        for tick in _ticks(first, last):
            text = seconds_text(tick) if tick else "0"
            shapes.append(
                f'<text x="{x(tick):.1f}" y="{height - _BELOW + 14}" font-size="11" text-anchor="middle">{text}</text>'
            )
    for point in points:
        paint = f'fill="none" stroke="{point.colour}" stroke-width="1.5"' if point.ring else f'fill="{point.colour}"'
        shapes.append(
            f'<circle cx="{x(point.x):.1f}" cy="{y(point.y):.1f}" r="{point.radius}" {paint}>'
            f"<title>{html.escape(point.text)}</title></circle>"
        )
    for line in lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{_FRONT}" stroke-width="1.5"/>')
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg>'


def _range(values: Sequence[float], *, zero: bool) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = (0.0 if zero else min(known)), max(known)
    return low, high * 1.08 if high > low else low + 1.0


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]

"""A trace as a picture."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from jaxllm.engine.observe.stage_record import bubble

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from jaxllm.engine.observe.stage_record import StageRecord
    from jaxllm.engine.observe.trace import Trace

# Wong's palette (Nature Methods, 2011), which the colour-blind tell apart as well
_PREFILL, _DECODE, _RUNNING, _WAITING = "#E69F00", "#0072B2", "#009E73", "#999999"
_CACHE, _DEVICE, _HOST, _PREEMPTION = "#56B4E9", "#0072B2", "#E69F00", "black"
_STAGE = ("#0072B2", "#56B4E9")


class TraceFigure(Figure):
    """Shows itself in a notebook, once, whether or not pyplot is in use there."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def plot(trace: Trace) -> Figure:
    """Panels over time: tokens a step, requests, KV cache, milliseconds a step, and of a pipeline what its stages do;
    triangles for preemptions. Each replica has panels of its own.
    """
    engines = trace.engines or [0]
    figure = TraceFigure(figsize=(9 * len(engines), 7.5), layout="constrained")
    heights = (3, 2, 2, 2, 2) if trace.stages else (3, 2, 2, 2)
    grid = figure.subplots(len(heights), len(engines), sharex=True, squeeze=False, height_ratios=heights)
    for column, engine in zip(grid.T, engines, strict=True):
        _column(list(column[:4]), trace.arrays(engine))
        if trace.stages:
            _stages(column[4], [record for record in trace.stages if record.engine == engine])
        column[-1].set_xlabel("seconds")
        if len(engines) > 1:
            column[0].set_title(f"replica {engine}")
    figure.align_ylabels(list(grid.flat))
    return figure


def _column(panels: list[Axes], steps: dict[str, np.ndarray]) -> None:
    if len(steps["start"]):
        # where the device runs it, until it has the next one; the host decides on a step while another one runs
        import numpy as np

        edges = np.append(steps["device_start"], steps["device_start"][-1] + steps["device_time"][-1])
        _tokens(panels[0], edges, steps)
        _requests(panels[1], edges, steps)
        _cache(panels[2], edges, steps)
        _times(panels[3], edges, steps)
        panels[0].set_xlim(float(edges[0]), float(max(edges[-1], edges[0] + 1e-6)))
        _preemptions(panels, steps)
    for panel, label in zip(panels, ("tokens a step", "requests", "KV cache", "ms a step"), strict=True):
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        _legend(panel)


def _legend(panel: Axes) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")


def _tokens(panel: Axes, edges: np.ndarray, steps: dict[str, np.ndarray]) -> None:
    decode, prefill = steps["num_decode_tokens"], steps["num_prefill_tokens"]
    panel.stairs(decode, edges, fill=True, color=_DECODE, label="decode")
    panel.stairs(decode + prefill, edges, baseline=decode, fill=True, color=_PREFILL, label="prefill")


def _requests(panel: Axes, edges: np.ndarray, steps: dict[str, np.ndarray]) -> None:
    running, waiting = steps["num_running"], steps["num_waiting"]
    panel.stairs(running, edges, fill=True, color=_RUNNING, label="running")
    panel.stairs(running + waiting, edges, baseline=running, fill=True, color=_WAITING, alpha=0.5, label="waiting")


def _cache(panel: Axes, edges: np.ndarray, steps: dict[str, np.ndarray]) -> None:
    panel.stairs(100 * steps["kv_cache_usage"], edges, fill=True, color=_CACHE, label="in use")
    panel.set_ylim(top=100)
    panel.yaxis.set_major_formatter("{x:.0f}%")


def _times(panel: Axes, edges: np.ndarray, steps: dict[str, np.ndarray]) -> None:
    host = 1e3 * sum(steps[f"{part}_time"] for part in ("schedule", "launch", "update", "output"))
    panel.stairs(1e3 * steps["device_time"], edges, baseline=None, color=_DEVICE, label="device")
    panel.stairs(host, edges, baseline=None, color=_HOST, label="host")


def _stages(panel: Axes, records: list[StageRecord]) -> None:
    """A bar for each stage, in which it works where the bar is coloured: neighbouring steps in two colours."""
    stages = sorted({record.stage for record in records})
    panel.set_yticks(stages, [f"stage {stage + 1}" for stage in stages])
    panel.spines[["top", "right"]].set_visible(False)
    if not records:
        return
    first, last = min(record.start for record in records), max(record.end for record in records)
    empty = f"bubble, {100 * (bubble(records) or 0.0):.0f}%"
    for stage in stages:
        place = (stage - 0.4, 0.8)
        panel.broken_barh([(first, last - first)], place, color=_WAITING, alpha=0.3, label=None if stage else empty)
        for odd, color in enumerate(_STAGE):
            bars = [(r.start, r.end - r.start) for r in records if r.stage == stage and r.step % 2 == odd]
            panel.broken_barh(bars, place, color=color, label=None if stage or odd else "at work")
    panel.invert_yaxis()
    _legend(panel)


def _preemptions(panels: list[Axes], steps: dict[str, np.ndarray]) -> None:
    times = steps["device_start"][steps["num_preemptions"] > 0]
    if not len(times):
        return
    for panel in panels[:3]:
        # x in seconds, y as a share of the panel's height
        heights, transform = [0.97] * len(times), panel.get_xaxis_transform()
        label = "preemption" if panel is panels[2] else None
        panel.plot(times, heights, "v", color=_PREEMPTION, transform=transform, clip_on=False, label=label)
        panel.vlines(times, 0, 1, color=_PREEMPTION, linewidth=0.6, alpha=0.4, transform=transform)

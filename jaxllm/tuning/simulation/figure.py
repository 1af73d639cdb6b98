"""A forecast is drawn: what there was over time, and how times are distributed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.engine.observe.trace_plot import TraceFigure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxllm.tuning.simulation.simulated_run import SimulatedRun

# Wong's palette (Nature Methods, 2011), which the colour-blind tell apart as well
_COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7")


def draw(runs: Mapping[str, SimulatedRun]) -> Figure:
    """Panels over time (KV cache, requests that run, requests that wait), and beside them the shares of requests whose
    first token, and of tokens which, took no longer than a time. A line a run.
    """
    figure = TraceFigure(figsize=(10, 5.5), layout="constrained")
    grid = figure.add_gridspec(6, 2, width_ratios=(3, 2))
    over_time = [figure.add_subplot(grid[2 * row : 2 * row + 2, 0]) for row in range(3)]
    shares = [figure.add_subplot(grid[3 * row : 3 * row + 3, 1]) for row in range(2)]
    for (heading, run), colour in zip(runs.items(), _COLOURS * len(runs), strict=False):
        series = (100 * run.kv_cache_usage, run.num_running, run.num_waiting)
        for panel, values in zip(over_time, series, strict=True):
            panel.plot(run.times, values, color=colour, linewidth=1, drawstyle="steps-post", label=heading)
        _share(shares[0], run.ttft, colour, heading)
        _share(shares[1], run.itl if len(run.itl) else run.tpot, colour, heading)
    for panel, label in zip(over_time, ("KV cache, %", "running", "waiting"), strict=True):
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
    for panel in over_time[:-1]:
        panel.tick_params(labelbottom=False)
    over_time[-1].set_xlabel("seconds")
    for panel, label in zip(shares, ("TTFT, ms", "ITL, ms"), strict=True):
        panel.set_xlabel(label)
        panel.set_ylabel("share")
        panel.set_ylim(0, 1)
    for panel in (*over_time, *shares):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    shares[0].legend(frameon=False, fontsize="small")
    return figure


def _share(panel: Axes, seconds: np.ndarray, colour: str, heading: str) -> None:
    if len(seconds):
        ordered = np.sort(seconds)
        panel.step(1e3 * ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=colour, label=heading)

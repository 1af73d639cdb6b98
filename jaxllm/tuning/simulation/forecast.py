"""What the simulator says of a workload, how far off it was where that could be told, and where it is from."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.extras import plotting
from jaxllm.tuning.simulation.simulated_run import SHOWN, SimulatedRun, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxllm.tuning.simulation.step_times import StepTimes
    from jaxllm.tuning.simulation.workload import Workload

#: of what a figure can be written as
SUFFIXES = (".png", ".svg", ".pdf")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Forecast:
    """Prints as a table; a notebook shows it with its figure."""

    workload: Workload
    #: heading -> how the workload fared; "measured" is no simulation, and the last one is with the settings asked for
    runs: Mapping[str, SimulatedRun]
    step_times: StepTimes
    #: name of a number -> by how much a simulation of steps that were not fitted was off, relative to what was
    #: measured; {}: nothing was measured
    errors: Mapping[str, float]
    #: what that simulation was of, in a sentence
    errors_of: str

    @property
    def simulated(self) -> SimulatedRun:
        """With the settings that were asked for."""
        return list(self.runs.values())[-1]

    def __str__(self) -> str:
        more = {"error": {name: f"{error:+.1%}" for name, error in self.errors.items()}} if self.errors else {}
        lines = [str(self.workload), "", table(dict(self.runs), more), "", self.errors_of, str(self.step_times)]
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self) -> Figure:
        """KV cache, queue and running requests over time, and how TTFT and ITL are distributed.

        Raises:
            ImportError: matplotlib is not there.
        """
        with plotting():
            from jaxllm.tuning.simulation.figure import draw
        return draw(self.runs)

    def save_plot(self, path: Path) -> None:
        """Write the figure; the suffix says of which kind.

        Raises:
            ValidationError: it is none of `SUFFIXES`, matplotlib is not there, or the file cannot be written.
        """
        if path.suffix.lower() not in SUFFIXES:
            raise ValidationError(f"a figure is a {', '.join(SUFFIXES)} file, which {str(path)!r} is not.")
        try:
            self.plot().savefig(path, dpi=150)
        except ImportError as error:
            raise ValidationError(str(error)) from None
        except OSError as error:
            raise ValidationError(f"{path} cannot be written: {error.strerror or error}") from None

    def _repr_html_(self) -> str:
        text = f"<pre>{html.escape(str(self))}</pre>"
        try:
            figure: Any = self.plot()
        except ImportError:
            return text
        image = base64.b64encode(figure._repr_png_()).decode()
        return f'<div>{text}<img src="data:image/png;base64,{image}"></div>'

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON knows."""
        return {
            "workload": str(self.workload),
            "runs": {heading: run.to_dict() for heading, run in self.runs.items()},
            "errors": dict(self.errors),
            "errors_of": self.errors_of,
            "steps": str(self.step_times),
        }


def relative_errors(simulated: SimulatedRun, measured: SimulatedRun) -> dict[str, float]:
    """By how much each number of a simulation is off, where there is such a number."""
    found, truth = simulated.to_dict(), measured.to_dict()
    pairs = {name: (found[name], truth[name]) for name, _, _ in SHOWN}
    return {
        name: (value - true) / true if true else float(value != 0)
        for name, (value, true) in pairs.items()
        if value is not None and true is not None
    }


def worst(errors: list[dict[str, float]]) -> dict[str, float]:
    """Of several simulations, the largest error of each number."""
    return {name: max((each[name] for each in errors if name in each), key=abs) for name in errors[0]}

"""What a split does: where each array lies, what a step reads, computes and exchanges, and how long that takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxllm.config.devices import GPUS
from jaxllm.config.links import LINKS
from jaxllm.parallel.mesh import DATA, STAGE
from jaxllm.planning.explanation_html import explanation_html
from jaxllm.planning.layout import ArrayLayout
from jaxllm.planning.plan import Plan
from jaxllm.planning.step_estimate import StepEstimate, StepExchange


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """A memory plan, and how it comes about."""

    plan: Plan
    #: axis of the mesh -> devices along it
    mesh: dict[str, int]
    #: that the devices are, by its name in `config.devices`; None: none that is known
    gpu: str | None
    #: of the weights, then of adapters, then of the KV cache
    layouts: tuple[ArrayLayout, ...]
    #: steps of several sizes; the largest comes last
    steps: tuple[StepEstimate, ...]

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    def __str__(self) -> str:
        return "\n".join([str(self.plan), "", self.mesh_line(), "", *self._array_lines(), "", *self._step_lines()])

    def mesh_line(self) -> str:
        """What the devices are and how they are connected, in a sentence."""
        axes = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
        if self.num_devices == 1:
            return "Mesh: one device"
        if self.gpu is None:
            return f"Mesh: {axes}; nothing is known of what connects devices of this kind, so exchanges have no times"
        link = LINKS[self.gpu]
        return f"Mesh: {axes}, each pair connected by {link.name}, {link.bandwidth / 1e9:.3g} GB/s in each direction"

    def _array_lines(self) -> list[str]:
        rows = [("", "array", "arrays", "axes", "shape", "on one device", "dtype", "bytes on one device", "")]
        for each in self.layouts:
            note = each.note(self.mesh)
            rows.append(
                (
                    "" if each.stage is None else f"stage {each.stage}",
                    each.name,
                    str(each.count),
                    axes_text(each),
                    shape_text(each.shape),
                    shape_text(each.device_shape),
                    each.dtype,
                    size_text(each.device_bytes),
                    note,
                )
            )
        title = "Arrays, each axis with the axis of the mesh that it is split over:"
        if STAGE not in self.mesh:
            rows = [row[1:] for row in rows]
            return [title, *table(rows, right={1, 6})]
        return [title, *table(rows, right={2, 7})]

    def _step_lines(self) -> list[str]:
        lines = [f"Steps of {'a replica' if DATA in self.mesh else 'the engine'}, as one device does them:"]
        for step in self.steps:
            least = "" if step.seconds is None else f": at least {time_text(step.seconds)}"
            of_stage = "" if step.stage is None else f"stage {step.stage}: "
            lines.append(f"  {of_stage}{step.name} ({step.tokens:,} token{'s' * (step.tokens > 1)}){least}")
            lines.append(f"    reads {size_text(step.weight_bytes)} of weights{_in(step.read_seconds)}")
            if step.copied_bytes:
                copied = f"copies {size_text(step.copied_bytes)} of them from the host's memory"
                lines.append(f"    {copied}{_in(step.copy_seconds)}")
            lines.append(f"    computes {flops_text(step.flops)} with them{_in(step.compute_seconds)}")
            if step.exchanges:
                told = f" by the rules of the split, since {step.not_compiled}" if step.not_compiled else ""
                lines.append(f"    exchanges{_in(step.exchange_seconds)}{told}:")
                lines += [f"    {line}" for line in table(list(exchange_rows(step.exchanges)), right={2, 3, 4, 5})]
        if self.gpu is not None:
            bandwidth = GPUS[self.gpu].memory_bandwidth
            context = 1000 * self.plan.memory.kv_bytes_per_token / bandwidth
            lines.append(
                f"  Attention reads the KV cache besides: {time_text(context)} for every 1,000 tokens of context of "
                "all requests."
            )
        if any(step.exchanges for step in self.steps):
            lines.append("  Exchanges are counted in the compiled programs, unless it says otherwise; times are what")
            lines.append("  bandwidths and NCCL's latencies allow.")
        return lines

    def _repr_html_(self) -> str:
        return explanation_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON has it; sizes are bytes."""
        return {**dataclasses.asdict(self), "plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Explanation:
        """Return the explanation of a `to_dict`."""
        parts: dict[str, Any] = {
            "plan": Plan.from_dict(fields["plan"]),
            "layouts": tuple(map(ArrayLayout.from_dict, fields["layouts"])),
            "steps": tuple(map(StepEstimate.from_dict, fields["steps"])),
        }
        return cls(**{**fields, **parts})


def axes_text(layout: ArrayLayout) -> str:
    """What the axes count, each with the axis of the mesh that it is split over."""
    names = ("+".join(dict.fromkeys(name for name, _ in joined)) for joined in layout.axes)
    pairs = zip(names, layout.mesh_axes, strict=True)
    over = ((name, (axis,) if isinstance(axis, str) else axis or ()) for name, axis in pairs)
    return ", ".join("/".join((name, *([" x ".join(axis)] if axis else []))) for name, axis in over)


def shape_text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def size_text(size: float) -> str:
    """Bytes in the unit that leaves at most four digits in front of the point."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.3f} GiB"


def flops_text(flops: float) -> str:
    """Operations in the unit that leaves at most three digits in front of the point."""
    for unit in ("", "k", "M", "G"):
        if flops < 1000:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:,.4g} TFLOP"


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def exchange_rows(exchanges: Iterable[StepExchange]) -> Iterable[tuple[str, ...]]:
    """A table's rows, the header first."""
    yield "kind", "over", "times", "a layer", "bytes each", "time", "devices"
    for each in exchanges:
        seconds = "" if each.seconds is None else time_text(each.seconds)
        a_layer = str(each.times_a_layer) if each.times_a_layer else ""
        yield (
            each.kind,
            each.over,
            str(each.times),
            a_layer,
            size_text(each.bytes),
            seconds,
            str(each.devices),
        )


def table(rows: Sequence[Sequence[str]], *, right: set[int]) -> list[str]:
    """Lines of a table whose columns are as wide as they must be.

    Args:
        right: columns that end at one place; the others begin at one.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def _in(seconds: float | None) -> str:
    return "" if seconds is None else f" in {time_text(seconds)}"

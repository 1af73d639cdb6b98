"""What was compiled, as a table: a row for each configuration, and columns for each GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .compiling import TARGETS, Results

MIB = 2**20
_HEADS = ("shared", "regs", "stack", "temp", "launched", "copied", "time")
_UNITS = ("KiB", "", "B", "MiB", "", "MiB", "s")
_WIDTHS = (6, 4, 5, 7, 8, 6, 5)
LEGEND = """
shared, regs, stack: the most that a kernel of the program takes, of shared memory, and for each thread of registers
and of stack (spilled registers); temp: temporaries of the program; launched, copied: launches, and bytes copied, of
the whole program (loops count once), divided by the model's layers where it goes through them; time: of compiling.
Without a GPU nothing is autotuned: tiles of XLA's own kernels and the choice of cuBLAS are not those of a run.
""".strip()


def lines(results: Mapping[tuple[str, str], Results]) -> Iterator[str]:
    """The table of each version of JAX."""
    for jax in dict.fromkeys(version for version, _ in results):
        columns = [results.get((jax, target), {}) for target in TARGETS]
        names = list(dict.fromkeys(name for column in columns for name in column))
        width = max(map(len, [*names, "configuration"]))
        block = sum(_WIDTHS) + len(_WIDTHS) - 1
        yield f"JAX {jax}"
        yield f"{'':{width}} | " + " | ".join(f"{f'{t}, {gpu.description}':^{block}}" for t, gpu in TARGETS.items())
        for cells in (_HEADS, _UNITS):
            head = "configuration" if cells is _HEADS else ""
            yield f"{head:{width}} | " + " | ".join([_row(cells)] * len(TARGETS))
        yield "-" * width + ("-+-" + "-" * block) * len(TARGETS)
        for name in names:
            yield f"{name:{width}} | " + " | ".join(_cells(column.get(name), block) for column in columns)
        yield ""
    yield from LEGEND.splitlines()


def summary(result: Mapping[str, Any]) -> dict[str, int]:
    """A result's numbers; bytes where they are of memory."""
    kernels, launches = result["kernels"], result["launches"]
    return {
        "shared": max((kernel["shared"] for kernel in kernels), default=0),
        "registers": max((kernel["registers"] or 0 for kernel in kernels), default=0),
        "stack": max((kernel["stack"] or 0 for kernel in kernels), default=0),
        "temporaries": result["temporaries"],
        "launches": launches["number"],
        "copied": launches["copied"],
    }


def _cells(result: Mapping[str, Any] | None, block: int) -> str:
    if result is None:
        return f"{'-':^{block}}"
    if "error" in result:
        return f"{'FAILED':^{block}}"
    n, layers = summary(result), result["layers"]
    return _row(
        (
            f"{n['shared'] / 1024:.1f}",
            n["registers"],
            n["stack"],
            f"{n['temporaries'] / MIB:.1f}",
            f"{n['launches'] / layers:.1f}" if layers else n["launches"],
            f"{n['copied'] / MIB / (layers or 1):.1f}",
            f"{result['seconds']:.1f}",
        )
    )


def _row(cells: tuple[Any, ...]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))

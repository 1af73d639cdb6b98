"""What devices exchange in a compiled program, counted in the compiler's own text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
#: an instruction's operation: what follows the result's shape and precedes its operands
_OPERATION = re.compile(r"= .*?[\]})] ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|async_execution_thread)=\{?%?([\w.\-, %]+)\}?")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def count_collectives(hlo: str) -> dict[str, int]:
    """How often each kind of collective runs in one run of a program.

    What is in a loop of a known number of rounds (the layers) counts that often; in any other loop, once. Of branches
    the one with most counts.

    Args:
        hlo: `jax.stages.Compiled.as_text()`.
    """
    return _walked(hlo, lambda line: 1)


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes that each kind of collective gives a device in one run of a program, counted as `count_collectives` does.

    Args:
        hlo: `jax.stages.Compiled.as_text()`.
    """
    return _walked(hlo, _result_bytes)


def _result_bytes(line: str) -> int:
    match = _OPERATION.search(line)
    assert match is not None
    shapes = _SHAPE.findall(line[line.index("= ") : match.start(1)])
    if match[1].endswith("-start"):  # of what is sent and what is received
        shapes = shapes[-1:]
    return sum(math.prod(int(n) for n in sizes.split(",") if n) * _itemsize(kind) for kind, sizes in shapes)


def _itemsize(kind: str) -> int:
    """Bytes of a number of HLO's type, which has its bits in its name."""
    bits = re.search(r"\d+", kind)
    return int(bits[0]) // 8 if bits else 1


def _walked(hlo: str, weigh: Callable[[str], int]) -> dict[str, int]:
    """What the collectives of a program weigh, by kind, each as often as it runs."""
    lines: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header[2]
            lines[current] = []
            entry = current if header[1] else entry
        elif current:
            lines[current].append(line)
    counted: dict[str, Counter[str]] = {}

    def count(name: str) -> Counter[str]:
        if name not in counted:
            counted[name] = Counter()  # a computation cannot call itself
            total: Counter[str] = Counter()
            for line in lines.get(name, ()):
                total += _count_line(line)
            counted[name] = total
        return counted[name]

    def _count_line(line: str) -> Counter[str]:
        match = _OPERATION.search(line)
        if not match:
            return Counter()
        operation = match[1]
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            return Counter({kind: weigh(line)})
        trips = int(found[1]) if operation == "while" and (found := _TRIPS.search(line)) else 1
        total: Counter[str] = Counter()
        for called in _CALLED.findall(line):
            for name in called.replace("%", "").split(","):
                inside = Counter({kind: trips * number for kind, number in count(name.strip()).items()})
                # of a conditional's branches one runs
                total = total | inside if operation == "conditional" else total + inside
        return total

    return dict(count(entry)) if entry else {}


def expected_collectives(num_layers: int, devices: int, *, layer_sums: int = 2, blocks: int = 1) -> dict[str, int]:
    """What a step of a model that is split exchanges, by the rules of `parallel.rules`: an all-reduce after attention
    and one after the MLP of each layer, one for the embedding, and an all-gather of each block of logits.

    Args:
        layer_sums: see `rules.layer_sums`.
        blocks: of rows that are sampled from; 0: there are no logits.
    """
    sums = {} if devices == 1 else {"all-reduce": layer_sums * num_layers + 1}
    return {**sums, "all-gather": blocks} if sums and blocks else sums

"""What devices exchange in a compiled program, counted in the compiler's own text."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
#: an instruction's operation: what follows the result's shape and precedes its operands
_OPERATION = re.compile(r"= .*?[\]})] ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|async_execution_thread)=\{?%?([\w.\-, %]+)\}?")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
#: the devices that take part: listed, or as [groups, devices of each]
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]<=)")
#: the logical axis that is named around what is exchanged (`layers.context.exchanged`)
_OVER = re.compile(r'op_name="[^"]*\bover_(\w+)')


class Collective(NamedTuple):
    """What devices exchange at one place of a program."""

    kind: str
    #: that it gives a device
    bytes: int
    #: that take part; 0: all
    devices: int
    #: the logical axis that is split over them; "": the program does not say
    over: str


def collectives(hlo: str) -> Counter[Collective]:
    """How often each collective runs in one run of a program.

    What is in a loop of a known number of rounds (the layers) counts that often; in any other loop, once. Of branches
    the one that exchanges most counts.

    Args:
        hlo: `jax.stages.Compiled.as_text()`.
    """
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
    counted: dict[str, Counter[Collective]] = {}

    def count(name: str) -> Counter[Collective]:
        if name not in counted:
            counted[name] = Counter()  # a computation cannot call itself
            total: Counter[Collective] = Counter()
            for line in lines.get(name, ()):
                total += count_line(line)
            counted[name] = total
        return counted[name]

    def count_line(line: str) -> Counter[Collective]:
        match = _OPERATION.search(line)
        if not match:
            return Counter()
        operation = match[1]
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            over = _OVER.search(line)
            return Counter({Collective(kind, _result_bytes(line), _devices(line), over[1] if over else ""): 1})
        trips = int(found[1]) if operation == "while" and (found := _TRIPS.search(line)) else 1
        called = [name.strip() for names in _CALLED.findall(line) for name in names.replace("%", "").split(",")]
        inside = [count(name) for name in called]
        if operation == "conditional":  # of the branches one runs
            return max(inside, key=_weight, default=Counter())
        total: Counter[Collective] = Counter()
        for each in inside:
            total += Counter({collective: trips * number for collective, number in each.items()})
        return total

    return count(entry) if entry else Counter()


def count_collectives(hlo: str) -> dict[str, int]:
    """How often each kind of collective runs in one run of a program, as `collectives` counts."""
    total: Counter[str] = Counter()
    for collective, number in collectives(hlo).items():
        total[collective.kind] += number
    return dict(total)


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes that each kind of collective gives a device in one run of a program, counted as `collectives` does."""
    total: Counter[str] = Counter()
    for collective, number in collectives(hlo).items():
        total[collective.kind] += number * collective.bytes
    return dict(total)


def _weight(found: Counter[Collective]) -> tuple[int, int]:
    return sum(number * collective.bytes for collective, number in found.items()), found.total()


def _result_bytes(line: str) -> int:
    match = _OPERATION.search(line)
    assert match is not None
    shapes = _SHAPE.findall(line[line.index("= ") : match.start(1)])
    if match[1] == "all-gather-start":  # of what is sent, then of what is received; several that were made one
        shapes = shapes[len(shapes) // 2 :]
    elif match[1].endswith("-start") and match[1] != "all-reduce-start":
        shapes = shapes[-1:]
    return sum(math.prod(int(n) for n in sizes.split(",") if n) * _itemsize(kind) for kind, sizes in shapes)


def _itemsize(kind: str) -> int:
    """Bytes of a number of HLO's type, which has its bits in its name."""
    bits = re.search(r"\d+", kind)
    return int(bits[0]) // 8 if bits else 1


def _devices(line: str) -> int:
    group = _GROUP.search(line)
    if group is None:
        return 0
    return int(group[2]) if group[2] else group[1].count(",") + 1


def expected_collectives(
    num_layers: int, devices: int, *, layer_sums: int = 2, slices: int = 1, exchanging: int = 0
) -> dict[str, int]:
    """What a step of a model that is split exchanges, by the rules of `parallel.rules`: an all-reduce after attention
    and one after the MLP of each layer, one for the embedding, and an all-gather of each slice of logits. Where copies
    of the model have its experts between them, an all-gather and a reduce-scatter of hidden states for each layer with
    experts besides, and an all-gather of which tokens there are.

    Args:
        devices: that share every layer.
        layer_sums: see `rules.layer_sums`.
        slices: of rows that are sampled from; 0: there are no logits.
        exchanging: layers whose experts copies of the model have between them (`rules.exchanging_layers`).
    """
    sums = {} if devices == 1 else {"all-reduce": layer_sums * num_layers + 1}
    gathers = (slices if sums else 0) + (exchanging + 1 if exchanging else 0)
    found = {**sums, "all-gather": gathers, "reduce-scatter": exchanging}
    return {kind: times for kind, times in found.items() if times}

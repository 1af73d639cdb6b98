"""What devices exchange in a compiled program, counted in the compiler's own text."""

from __future__ import annotations

import re
from collections import Counter

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
#: an instruction's operation: what follows the result's shape and precedes its operands
_OPERATION = re.compile(r"= .*?[\]})] ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|async_execution_thread)=\{?%?([\w.\-, %]+)\}?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def count_collectives(hlo: str) -> dict[str, int]:
    """How often each kind of collective runs in one run of a program.

    What is in a loop of a known number of rounds (the layers) counts that often; in any other loop, once.

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
            return Counter({kind: 1})
        trips = int(found[1]) if operation == "while" and (found := _TRIPS.search(line)) else 1
        total: Counter[str] = Counter()
        for called in _CALLED.findall(line):
            for name in called.replace("%", "").split(","):
                for kind, number in count(name.strip()).items():
                    total[kind] += trips * number
        return total

    return dict(count(entry)) if entry else {}


def expected_collectives(num_layers: int, devices: int, *, blocks: int = 1) -> dict[str, int]:
    """What a step of a model that is split exchanges, by the rules of `parallel.rules`: an all-reduce after attention
    and one after the MLP of each layer, one for the embedding, and an all-gather of each block of logits.

    Args:
        blocks: of rows that are sampled from.
    """
    return {} if devices == 1 else {"all-reduce": 2 * num_layers + 1, "all-gather": blocks}

"""This says where the time of compiled programs goes on a CPU, by JAX's profile and the source of each operation.

XLA:CPU records how long the thread that begins an operation is at it; where other threads still are, the operation ends
when the next one begins. A moment counts for the operations that run in it, in equal shares; loops, calls and branches
only hold others. Which line of which file an operation comes from, the compiled program's text says.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

#: source file -> what its operations do; the innermost frame that is here counts
PARTS = {
    "jaxllm/layers/linear.py": "products with weights",
    "jaxllm/layers/stacked_matrix.py": "products with weights",
    "jaxllm/layers/embedding.py": "embeddings, product with the head",
    "jaxllm/layers/norm.py": "norms",
    "jaxllm/layers/rope.py": "rotation",
    "jaxllm/layers/activation.py": "activation",
    "jaxllm/models/segments.py": "a layer's weights copied",
    "jaxllm/sampling/": "sampling",
    "jaxllm/runner/": "fields of the step",
    "pallas_kernels/dense_matmul/": "products with weights",
    "pallas_kernels/packed_matmul/": "products with weights",
    "pallas_kernels/quant_matmul/": "products with weights",
    "pallas_kernels/lora_matmul/": "products with weights",
    "pallas_kernels/paged_attention/": "attention",
    "pallas_kernels/kv_write/": "keys and values written",
}
OTHER = "other operations"
BETWEEN = "between operations"
#: opcodes of what only holds others
_HOLDERS = frozenset(("while", "call", "conditional"))
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = .*?[\])}] ([a-z-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_CALLS = re.compile(r"calls=%?([^\s,}]+)")
#: opcodes of what takes no time
_NO_WORK = frozenset(("parameter", "constant", "get-tuple-element", "tuple", "bitcast"))
_ENTRY = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")
_FRAME = re.compile(r"stack_frame_id=(\d+)")


@dataclasses.dataclass(kw_only=True)
class Launch:
    """One run of a program, whose times are in seconds."""

    #: from its first operation to the end of the last one
    seconds: float
    #: part -> its share; they add up to `seconds`
    parts: dict[str, float]


class ProgramText:
    """The text of an optimised HLO module: which part each of its instructions belongs to.

    What does not say where it comes from belongs to what it is fused of, or to the loop that it is in if nearly all
    else there is of one part.
    """

    def __init__(self, text: str) -> None:
        frames = _frames(text)
        #: name of an instruction -> its part; None: it holds others
        self.parts: dict[str, str | None] = {}
        inside: dict[str, collections.Counter[str]] = {}
        homes: dict[str, str] = {}
        fused: dict[str, str] = {}
        home = ""
        for line in text.splitlines():
            if begins := _COMPUTATION.match(line):
                # a program's own instructions are of all kinds
                home = "" if line.startswith("ENTRY") else begins[1]
                inside[home] = collections.Counter()
            if (found := _INSTRUCTION.match(line)) is None:
                continue
            name, opcode = found.groups()
            part = _of_line(line, frames)
            self.parts[name], homes[name] = None if opcode in _HOLDERS else part, home
            if part != OTHER and opcode not in _NO_WORK:
                inside[home][part] += 1
            if opcode == "fusion" and (calls := _CALLS.search(line)):
                fused[name] = calls[1]
        for name, part in self.parts.items():
            if part == OTHER:
                of_fusion = inside[fused[name]].most_common(1) if fused.get(name) in inside else []
                around = inside[homes[name]].most_common(1) if homes[name] else []
                if of_fusion:
                    self.parts[name] = of_fusion[0][0]
                elif around and around[0][1] > 0.8 * inside[homes[name]].total():
                    self.parts[name] = around[0][0]


def _of_line(line: str, frames: dict[int, str]) -> str:
    frame = _FRAME.search(line)
    part = frames.get(int(frame[1]) if frame else 0, OTHER)
    if part == PARTS["jaxllm/models/segments.py"] and "dynamic_" not in line:
        # what the loop over the layers calls, not what it does itself
        return OTHER
    return part


def _frames(text: str) -> dict[int, str]:
    """Return the part of each stack frame, from the tables at the head of a module."""
    tables: dict[str, dict[int, str]] = {}
    rows: dict[int, str] | None = None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            rows = tables.setdefault(line, {})
        elif rows is not None and (entry := _ENTRY.match(line)):
            rows[int(entry[1])] = entry[2] if entry[2] is not None else entry[3]
        elif line:
            rows = None
    files = {number: _part(name) for number, name in tables.get("FileNames", {}).items()}
    places = {number: files.get(_field(row, "file_name_id")) for number, row in tables.get("FileLocations", {}).items()}
    parents = {n: _field(row, "parent_frame_id") for n, row in tables.get("StackFrames", {}).items()}
    own = {n: places.get(_field(row, "file_location_id")) for n, row in tables.get("StackFrames", {}).items()}
    found: dict[int, str] = {}
    for number in own:
        frame, seen = number, set()
        while frame in own and own[frame] is None and frame not in seen:
            seen.add(frame)
            frame = parents[frame]
        found[number] = own.get(frame) or OTHER
    return found


def _field(row: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", row)
    return int(found[1]) if found else 0


def _part(file: str) -> str | None:
    return next((part for piece, part in PARTS.items() if f"/{piece}" in f"/{file}"), None)


@dataclasses.dataclass(slots=True)
class Run:
    """What the profile has of one run of a program."""

    operations: list[_Operation] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class _Operation:
    """One operation of a run, whose moments are in nanoseconds."""

    name: str
    begin: float
    #: when the thread that began it went on
    end: float
    #: when what waits for it was told, often after that had begun: a thread that is done goes on with it first
    told: float


def runs(folder: Path) -> list[Run]:
    """Return the runs in the profile that `jax.profiler` has written into `folder`, in the order of time."""
    from jax.profiler import ProfileData

    (file,) = folder.rglob("*.xplane.pb")
    found: dict[int, Run] = {}
    begun: dict[int, _Operation] = {}
    told: list[tuple[int, float]] = []
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name.startswith("end: "):
                    told += [(value, event.start_ns) for key, value in event.stats if key == "_c"]
                    continue
                stats = dict(event.stats)
                if "hlo_op" not in stats:
                    continue
                end = event.start_ns + event.duration_ns
                operation = _Operation(stats["hlo_op"], event.start_ns, end, end)
                found.setdefault(stats["run_id"], Run()).operations.append(operation)
                if "_p" in stats:
                    begun[stats["_p"]] = operation
    for context, moment in told:
        if context in begun:
            begun[context].told = max(begun[context].told, moment)
    for run in found.values():
        run.operations.sort(key=lambda operation: operation.begin)
    return sorted(found.values(), key=lambda run: run.operations[0].begin)


def launch(run: Run, program: ProgramText) -> Launch:
    """Share the time of a run out to the program's parts."""
    first, last = run.operations[0].begin, max(operation.end for operation in run.operations)
    moments: list[tuple[float, int, int]] = []
    parts: dict[int, str] = {}
    for index, operation in enumerate(run.operations):
        part = program.parts.get(operation.name, OTHER)
        if part is not None:
            parts[index] = part
            moments += [(operation.begin, 1, index), (operation.end, -1, index)]
    shares: dict[str, float] = collections.defaultdict(float)
    active: set[int] = set()
    before, latest = first, -1
    for moment, change, index in sorted(moments):
        span = moment - before
        if active:
            for other in active:
                shares[parts[other]] += span / len(active)
        elif latest >= 0:
            # other threads are at it until the next one begins
            rest = min(max(run.operations[latest].told - before, 0), span)
            shares[parts[latest]] += rest
            shares[BETWEEN] += span - rest
        else:
            shares[BETWEEN] += span
        before = moment
        if change > 0:
            active.add(index)
            latest = index
        else:
            active.discard(index)
    shares[BETWEEN] += last - before
    return Launch(seconds=(last - first) / 1e9, parts={part: spent / 1e9 for part, spent in shares.items()})


def mean_parts(launches: Iterable[Launch]) -> dict[str, float]:
    """Return the mean seconds that each part takes of a launch, longest first."""
    launches = list(launches)
    total: dict[str, float] = collections.defaultdict(float)
    for each in launches:
        for part, spent in each.parts.items():
            total[part] += spent / len(launches)
    return dict(sorted(total.items(), key=lambda item: -item[1]))

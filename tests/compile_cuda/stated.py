"""The numbers that an engine's programs may not exceed, in ``stated.json``: launches, copied bytes and temporaries of
each program, all of its layers together. ``PYTHONPATH=tests python -m compile_cuda --record`` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from .compiling import Results
from .table import MIB, summary

FILE = Path(__file__).with_name("stated.json")
_BYTES = ("temporaries", "copied")
#: MiB by which temporaries may exceed theirs: the compiler's packing of buffers is not worth a failure
_SLACK = 4


def record(results: Mapping[tuple[str, str], Results]) -> None:
    """State what came out; what is stated of other versions, targets and programs stays."""
    numbers = json.loads(FILE.read_text()) if FILE.exists() else {}
    for (jax, target), found in results.items():
        for name, result in found.items():
            if "error" not in result and result["is_step"]:
                numbers.setdefault(jax, {}).setdefault(name, {})[target] = _numbers(result)
    rows = {jax: dict(sorted(programs.items())) for jax, programs in sorted(numbers.items())}
    FILE.write_text(_text(rows))


def excesses(jax: str, target: str, found: Results) -> Iterator[str]:
    """What exceeds its stated number, or has none."""
    programs = json.loads(FILE.read_text()).get(jax, {})
    for name, result in found.items():
        if "error" in result or not result["is_step"]:
            continue
        limits = programs.get(name, {}).get(target)
        if limits is None:
            yield f"{name}: no numbers are stated; `PYTHONPATH=tests python -m compile_cuda --record` states them"
            continue
        for key, value in _numbers(result).items():
            if value > limits[key] + (_SLACK if key == "temporaries" else 0):
                unit = " MiB" if key in _BYTES else ""
                yield f"{name}: {key} {value}{unit}, stated are at most {limits[key]}{unit}"


def _numbers(result: Mapping) -> dict[str, int]:
    found = summary(result)
    return {
        "launches": found["launches"],
        "copied": -(-found["copied"] // MIB),
        "temporaries": -(-found["temporaries"] // MIB),
    }


def _text(rows: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]) -> str:
    """JSON with a line for each program and target."""
    versions = []
    for jax, programs in rows.items():
        entries = []
        for name, targets in programs.items():
            cells = ",\n".join(f"   {json.dumps(t)}: {json.dumps(n)}" for t, n in sorted(targets.items(), key=_order))
            entries.append(f"  {json.dumps(name)}: {{\n{cells}\n  }}")
        versions.append(f" {json.dumps(jax)}: {{\n" + ",\n".join(entries) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def _order(item: tuple[str, object]) -> int:
    return int(item[0].removeprefix("sm_"))

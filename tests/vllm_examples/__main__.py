"""Runs vLLM's offline examples of text on jaxllm, with the package renamed in their imports and unchanged.

Prints a table and writes what is in it as JSON. It needs what the tests need, fetches vLLM's source distribution, of
which nothing is installed, and is no part of `make test`: see README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from vllm_examples import stand_ins
from vllm_examples.examples import EXAMPLES, Example
from vllm_examples.outcome import outcome, renamed
from vllm_examples.source import fetch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
SMALL_ENGINES = Path(__file__).with_name("small_engines")
ROADS = ("renamed", "as_vllm")


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    source: Path = arguments.source or fetch(arguments.version, work / "source")
    stand_ins.write(work / "models")
    chosen = [example for example in EXAMPLES if not arguments.only or any(w in example.path for w in arguments.only)]
    if not chosen:
        parser.error(f"no example has {', '.join(arguments.only)} in its path")
    folder = _renamed_copy(source / "examples", work / "renamed")
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for example in chosen:
        found = results[example.path] = {}
        for road in ROADS:
            begin = time.monotonic()
            place = folder if road == "renamed" else source / "examples"
            found[road] = _run(road, place / example.path, example, work, arguments.timeout)
            print(f"{example.path} {road} {time.monotonic() - begin:.0f} s: {found[road]}", flush=True)
        ordered = {example.path: results[example.path] for example in EXAMPLES if example.path in results}
        # after each: a long run may be cut
        arguments.output.write_text(json.dumps(ordered, indent=1) + "\n")
    print(table(ordered))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vllm_examples", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PART", help="examples whose path has one of these parts")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results, where others are kept; (%(default)s)")
    parser.add_argument("--source", type=Path, help="vLLM's sources, where they are here already")
    parser.add_argument("--version", default="0.33.*", help="of the source distribution to fetch (%(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one run (%(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/vllm_examples"), help="folder for sources and models (%(default)s)"
    )
    return parser


def _renamed_copy(examples: Path, folder: Path) -> Path:
    """The examples with their imports changed; templates and data beside them stay where they are."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(examples, folder)
    for script in folder.rglob("*.py"):
        script.write_text(renamed(script.read_text()))
    return folder


def _run(road: str, script: Path, example: Example, work: Path, timeout: float) -> str:
    command = [sys.executable, *(["-m", "jaxllm.as_vllm"] if road == "as_vllm" else []), str(script)]
    here = work / "runs"
    here.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "HF_HOME": str(work / "models"),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join((str(SMALL_ENGINES), str(ROOT))),
    }
    try:
        done = subprocess.run(
            [*command, *example.arguments],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return outcome(None, "")
    log = here / f"{script.stem}.{road}.log"
    log.write_text(f"{done.stdout}\n{done.stderr}\n")
    return outcome(done.returncode, done.stderr)


def table(results: dict[str, dict[str, str]]) -> str:
    """The results as Markdown, with a line that counts them."""
    rows = ["| example | renamed | as_vllm |", "|---|---|---|"]
    rows += [f"| {path} | {found['renamed']} | {found['as_vllm']} |" for path, found in results.items()]
    num_ok = sum(set(found.values()) == {"ok"} for found in results.values())
    return "\n".join([*rows, "", f"{num_ok} of {len(results)} run both ways."])


if __name__ == "__main__":
    raise SystemExit(main())

"""``make gpu-check``: everything that only a GPU can show, stage by stage.

Exit status: 0; 1 when a stage about correctness did not pass, or, with ``--strict``, when a target was missed or any
stage did not get that far.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_check.report import Report
from gpu_check.stages import STAGES, TOTAL_SECONDS, run_stage


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    start = time.monotonic()
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": arguments.commit or _commit(),
        "stages_asked_for": arguments.stages,
    }
    report = Report(facts, rehearsal=arguments.rehearse)
    # early: an output that cannot be written should not be found out at the end
    report.write(arguments.output)
    for stage in STAGES:
        if stage.name not in arguments.stages:
            continue
        print(f"== {stage.title}", flush=True)
        left = min(stage.ends_at, arguments.seconds) - (time.monotonic() - start)
        if report.has_no_gpu:
            result = {"status": "not run: there is no GPU", "seconds": 0.0, "records": []}
        else:
            result = run_stage(stage, seconds=left, rehearsal=arguments.rehearse)
        report.add(stage, result)
        report.write(arguments.output)
    print(report.table())
    print(f"\n{time.monotonic() - start:.0f} s; written to {arguments.output}")
    return int(not report.is_correct or (arguments.strict and bool(report.missed)))


def _parser() -> argparse.ArgumentParser:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="(default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes; measures nothing")
    parser.add_argument("--strict", action="store_true", help="missed targets fail the check")
    default = [stage.name for stage in STAGES if not stage.is_extra]
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=names,
        default=default,
        metavar="STAGE",
        help=f"{', '.join(names)} (default: {', '.join(default)})",
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--commit", help="what is checked, where git cannot say")
    return parser


def _commit() -> str:
    """The commit, with a + when files differ from it."""
    try:
        asked = [
            subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return asked[0] + ("+" if asked[1] else "")


if __name__ == "__main__":
    sys.exit(main())

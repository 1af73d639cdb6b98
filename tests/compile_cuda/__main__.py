"""The table, for people:

PYTHONPATH=tests python -m compile_cuda [--quick] [--only TEXT] [--jax VERSION] [--record]
"""

from __future__ import annotations

import argparse
import sys

from . import stated, table
from .compiling import compile_everywhere


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m compile_cuda", description="Compile for GPUs, without one.")
    parser.add_argument("--quick", action="store_true", help="a part of the configurations")
    parser.add_argument("--only", default="", metavar="TEXT", help="configurations whose names contain it")
    parser.add_argument("--jax", action="append", default=[], metavar="VERSION", help="with this JAX; default: all")
    parser.add_argument("--record", action="store_true", help=f"state what came out in {stated.FILE.name}")
    options = parser.parse_args()
    results = compile_everywhere(quick=options.quick, only=options.only, jaxes=options.jax, tell=tell)
    for line in table.lines(results):
        print(line)
    if options.record:
        stated.record(results)
    return int(any("error" in result for found in results.values() for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Write constraints.txt: exact versions of everything, for several Pythons in one file.

Usage: lock.py FILE PYTHON [PYTHON ...]

Each Python resolves the dependencies for a fresh virtual environment, and pip says what it would install: a few minutes
each, and no gigabytes. A version that all agree on becomes a plain pin; where they differ, each pin carries an
environment marker.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: torch's default build for newer Pythons is several gigabytes, so only the first Python resolves it
EXTRAS = ("test,dev,peers,ray,clients", "smoke")
#: JAX dropped Python 3.11 after 0.10; the newest for 3.12 is not what GPU machines have
PREFERRED = {"3.12": ["jax==0.11.2"]}

#: what is here, and what builds it
NOT_PINNED = ("jaxllm", "pip", "setuptools", "wheel")


def resolve(python: str, extras: str) -> tuple[str, dict[str, str]]:
    """The Python's "major.minor" and the versions that pip chose, by package."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = f"{folder}/bin/python"
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        version = subprocess.run([inside, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        wanted = ["--editable", f"{ROOT}[{extras}]", *PREFERRED.get(version, [])]
        report = Path(folder) / "report.json"
        how = ["-qq", "--disable-pip-version-check", "--dry-run", "--ignore-installed", "--report", str(report)]
        subprocess.run([inside, "-m", "pip", "install", *how, *wanted], check=True)
        found = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    pins = {each["name"].lower().replace("_", "-"): each["version"] for each in found}
    # A local version ("2.13.0+cpu") names one build; the pin should take any.
    return version, {name: pin.split("+")[0] for name, pin in pins.items() if name not in NOT_PINNED}


def merge(resolved: list[tuple[str, dict[str, str]]]) -> list[str]:
    """One line a package, or one a Python where the versions differ."""
    lines = []
    (oldest, _), (newest, _) = resolved[0], resolved[-1]
    for name in sorted({name for _, pins in resolved for name in pins}):
        versions = {pins[name] for _, pins in resolved if name in pins}
        if len(versions) == 1:
            lines.append(f"{name}=={versions.pop()}")
            continue
        for python, pins in resolved:
            if name not in pins:
                continue
            sign = "<=" if python == oldest else ">=" if python == newest else "=="
            lines.append(f'{name}=={pins[name]} ; python_version {sign} "{python}"')
    return lines


def main() -> None:
    target, *pythons = sys.argv[1:]
    resolved = [resolve(python, EXTRAS[min(i, len(EXTRAS) - 1)]) for i, python in enumerate(pythons)]
    Path(target).write_text("# Written by `make lock`.\n" + "\n".join(merge(resolved)) + "\n")


if __name__ == "__main__":
    main()

"""What the text of a command's option means; argparse tells what is raised for one that means nothing."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.config import argument_checks


def count(text: str) -> int:
    """A whole number; as in vLLM, 1k is 1000 and 1K is 1024 (likewise m, g), and 25.6k is 25600."""
    try:
        return argument_checks.count("", text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (1000, 1k and 25.6k are)") from None


def devices(text: str) -> int:
    """A number of devices."""
    try:
        return argument_checks.count("", text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (1, 2 and 4 are)") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number (0.5 and 1e-3 are)") from None


def seconds(text: str) -> float:
    """A time that ends."""
    found = number(text)
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds (5 and 30 are)")
    return found


def size(text: str) -> int:
    """Bytes, as `argument_checks.size` reads them."""
    try:
        return argument_checks.size("", text)
    except ValidationError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of bytes (4294967296, 4GiB and 500MB are)"
        ) from None


def gibibytes(text: str) -> float:
    """GiB, as `argument_checks.gibibytes` reads them."""
    try:
        return argument_checks.gibibytes("", text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB (4, 0.5 and 500MB are)") from None


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"rope_theta\": 10000}}'")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A whole number that is not below 0."""
    return _at_least(0, text)


def counts(text: str) -> list[int]:
    """Whole numbers above 0, which commas separate."""
    return [positive(part) for part in text.split(",")]


def shares(text: str) -> list[float]:
    """Percentages in (0, 100], which commas separate; whole ones as whole numbers."""
    found = [number(part) for part in text.split(",")]
    for share in found:
        if not 0 < share <= 100:
            raise argparse.ArgumentTypeError(f"{share:g} is not in (0, 100]")
    return [int(share) if share.is_integer() else share for share in found]


def milliseconds(text: str) -> float:
    """A time above 0."""
    found = number(text)
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return found


def output_file(text: str) -> Path:
    """A file that can be written: what takes minutes to find must not be lost in the end."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if path.exists() and not path.is_file():
        return path  # a device or a pipe
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror or error}") from None
    if new:
        path.unlink()
    return path


def _at_least(least: int, text: str) -> int:
    found = count(text)
    if found < least:
        raise argparse.ArgumentTypeError(f"{text!r} is below {least}")
    return found

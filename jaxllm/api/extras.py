"""How an extra of jaxllm, such as "orbax", gets installed."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator


def how_to_install(extra: str) -> str:
    """The command that brings an extra of pyproject.toml.

    jaxllm is on no index, so ``pip install 'jaxllm[orbax]'`` would find nothing: it is its checkout that pip installs,
    and the packages that the extra stands for have names that work anywhere.
    """
    in_checkout = f"in a checkout of jaxllm, pip install '.[{extra}]'"
    packages = _packages(extra)
    return f"pip install {' '.join(packages)} (or, {in_checkout})" if packages else in_checkout


@contextlib.contextmanager
def plotting() -> Iterator[None]:
    """Around an import that needs matplotlib. Raises ImportError where it is not there, saying how it would be."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError(f"plot() needs matplotlib: {how_to_install('plot')}.") from error


def _packages(extra: str) -> list[str]:
    """What the extra stands for, quoted for a shell; nothing where jaxllm is on the path and not installed."""
    try:
        listed = importlib.metadata.requires("jaxllm") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[str] = []
    for line in listed:
        package, _, marker = line.partition(";")
        if marker.replace('"', "'").strip() == f"extra == '{extra}'":
            found.append(f"'{package.strip()}'")
    return found

"""Which packages jaxllm asks for, and which are there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jaxllm

#: name, extras, versions, and the extra of jaxllm that asks for it
_REQUIREMENT = re.compile(
    r"""(?P<name>[\w.-]+)\s*(?:\[(?P<extras>[^]]*)\])?\s*(?P<versions>[^;]*)"""
    r"""(?:;\s*extra\s*==\s*["'](?P<extra>[\w-]+)["'])?\s*"""
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """A package that jaxllm asks for."""

    name: str
    #: versions that will do, such as ">=2,<3"
    wanted: str
    #: None: it is not installed
    version: str | None
    #: the extra of jaxllm that it belongs to; "": every installation
    extra: str = ""

    @property
    def fits(self) -> bool:
        """Whether its version will do, as far as that can be told."""
        if self.version is None:
            return False
        try:
            from packaging.specifiers import SpecifierSet
        except ImportError:  # other packages bring it, and they may be what is missing
            return True
        return SpecifierSet(self.wanted).contains(self.version, prereleases=True)


def packages() -> list[Package]:
    """Return what jaxllm asks for: all that every installation needs, and what its extras for users bring.

    Extras that bring other extras of jaxllm are for its development.
    """
    found, development = [], set()
    for text in _requirements():
        match = _REQUIREMENT.fullmatch(text)
        if match is None:
            continue
        name, extras, extra = match["name"], match["extras"], match["extra"] or ""
        if name == "jaxllm":
            development.add(extra)
            continue
        if name == "jax" and extras:  # its plugin is what such an extra brings
            name = f"{name}-{extras}-plugin"
        version = _version(name)
        found.append(Package(name=name, wanted=match["versions"].strip(), version=version, extra=extra))
    return [package for package in found if package.extra not in development]


def is_installed() -> bool:
    """Whether jaxllm is installed as a package, and not only found on the path."""
    return _version("jaxllm") is not None


def _requirements() -> Iterator[str]:
    # a checkout knows better than what was written down when it was installed
    checkout = Path(jaxllm.__file__).parents[1] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text())["project"]
        yield from project["dependencies"]
        for extra, texts in project["optional-dependencies"].items():
            yield from (f"{text}; extra == '{extra}'" for text in texts)
    elif is_installed():
        yield from importlib.metadata.requires("jaxllm") or ()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

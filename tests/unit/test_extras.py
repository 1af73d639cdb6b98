"""Hints of how to install what is missing: they work from a checkout, as jaxllm is on no index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import jaxllm
from jaxllm.api.extras import how_to_install

PACKAGE = Path(jaxllm.__file__).parent


def test_every_hint_names_an_extra_that_exists():
    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "extras.py"]
    used = {name for text in sources for name in re.findall(r"how_to_install\(['\"](\w+)['\"]\)", text)}
    assert used and used <= extras.keys()
    for text in sources:
        assert "pip install 'jaxllm[" not in text and "pip install '.[" not in text


def test_a_hint_has_the_packages_and_the_extra():
    in_checkout = "in a checkout of jaxllm, pip install '.[tables]'"
    assert how_to_install("tables") == f"pip install 'pyarrow>=18' (or, {in_checkout})"
    assert how_to_install("no-such-extra") == "in a checkout of jaxllm, pip install '.[no-such-extra]'"

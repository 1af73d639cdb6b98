"""What the READMEs say works as pasted, and points at what is there."""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.quick_compile import FOR_LONG_RUNS, flags

from jaxllm.entrypoints.cli import build_parser

ROOT = Path(__file__).parents[2]
FOLDERS = ("jaxllm", "pallas_kernels", "tests", "configs")
READMES = [ROOT / "README.md", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("README.md")))]
#: README -> what its Python prints
PRINTED = {
    "README.md": ("Memory plan", "Paris", "The three primary colours are ->"),
    "jaxllm/api/README.md": ("Paris", "vllm:prefix_cache_hits", "vllm:num_preemptions"),
}


def name(readme: Path) -> str:
    return readme.relative_to(ROOT).as_posix()


def code(readme: Path, language: str = "") -> list[str]:
    """The blocks of one language; the shell's have none."""
    parts = re.findall(r"^```(\w*)\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
    return [text for of, text in parts if of == language]


def commands() -> list[tuple[str, str]]:
    """Every line of a shell block that calls jaxllm, and its README."""
    found = []
    for readme in READMES:
        for text in code(readme):
            lines = text.replace("\\\n", " ").splitlines()
            found += [(name(readme), line.removeprefix("$ ")) for line in lines if re.match(r"(\$ )?jaxllm ", line)]
    return found


def test_only_the_expected_readmes_have_python():
    assert {name(readme) for readme in READMES if code(readme, "python")} == set(PRINTED)


@pytest.mark.parametrize(
    "readme", [pytest.param(name, marks=() if name == "README.md" else pytest.mark.thorough) for name in PRINTED]
)
def test_a_readmes_python_works_as_pasted(readme: str, smollm2_gguf: Path, minilm: Path, tmp_path: Path):
    script = tmp_path / "pasted.py"
    script.write_text("\n".join(code(ROOT / readme, "python")))
    compiled = flags(FOR_LONG_RUNS, os.environ["XLA_FLAGS"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": compiled}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert result.returncode == 0, result.stderr
    for text in PRINTED[readme]:
        assert text in result.stdout


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return build_parser()


@pytest.mark.parametrize(("readme", "command"), commands())
def test_a_readmes_commands_are_understood(readme: str, command: str, parser: argparse.ArgumentParser):
    parser.parse_args(shlex.split(command, comments=True)[1:])


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_a_readmes_links_lead_somewhere(readme: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", readme.read_text()):
        if "://" not in target:
            assert (readme.parent / target).exists(), f"{name(readme)} points at {target}"


@functools.cache
def known() -> tuple[str, set[str]]:
    """The paths of what the READMEs speak of, a line each, and every word in it."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    words = [word for path in paths if path.suffix == ".py" for word in re.findall(r"\w+", path.read_text())]
    return "".join(f"/{path.relative_to(ROOT).as_posix()}\n" for path in paths), set(words)


#: of other packages, and what `models/registry.py` puts together
NOT_WRITTEN = {"request_resources", "RobertaModel", "XLMRobertaModel"}


@pytest.mark.parametrize("readme", [path for path in READMES if path.parent.name != "vllm_examples"], ids=name)
def test_a_readmes_files_and_names_are_there(readme: Path):
    prose = re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.DOTALL | re.MULTILINE)
    paths, words = known()
    for path in re.findall(r"`([\w/]+\.py|\w+(?:/\w+)+)/?`", prose):
        assert path == "org/name" or f"/{path}\n" in paths, f"{name(readme)} names the file {path}"
    for called in re.findall(r"`((?:\w+\.)*[A-Za-z]\w*[A-Za-z0-9])(?:\(\))?`", prose):
        last = called.rpartition(".")[2]
        assert last in words | NOT_WRITTEN, f"{name(readme)} names {called}, which stands nowhere"


def test_the_map_has_every_room():
    rooms = {path.name for path in (ROOT / "jaxllm").iterdir() if path.suffix in ("", ".py")}
    written = set(re.findall(r"`(\w+(?:\.py)?)/?`", (ROOT / "jaxllm/README.md").read_text()))
    assert {room for room in rooms if not room.startswith("__")} <= written


def test_the_readme_is_for_a_newcomer():
    assert len((ROOT / "README.md").read_bytes()) <= 8192
    first = code(ROOT / "README.md")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]

"""What is kept for later starts has a bound, and what was not used for longest goes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.startup.cache_bound import FOLDERS, cache_bound, keep_within
from jaxllm.startup.setup import compile_cache
from jaxllm.startup.tokenizer_files import kept_tokenizers
from pallas_kernels import kept_files

NAMES = ("xla/jax-1/a.program", "xla/jax-1/a.name", "xla/jax-2/b.program", "kernels/k.o", "tokenizers/t.tokenizer")
#: seconds; of another user's files that are in use
LONG_AGO = 1e9


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each file has 100 bytes with its digest, and was used later than the one before."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    for number, name in enumerate(NAMES):
        kept_files.write(tmp_path / name, bytes(100 - 32))
        os.utime(tmp_path / name, (LONG_AGO + number, LONG_AGO + number))
    return tmp_path


def left(folder: Path) -> list[str]:
    return [name for name in NAMES if (folder / name).exists()]


def test_what_was_not_used_for_longest_goes_first(folder: Path, caplog: pytest.LogCaptureFixture):
    models = folder / "models" / "m.program"
    models.parent.mkdir()
    models.write_bytes(bytes(10**6))
    (folder / "xla" / "jax-1" / "start_times.json").write_bytes(bytes(10**6))
    for bound in (None, 500):
        keep_within(bound)
        assert left(folder) == list(NAMES)
    assert kept_files.read(folder / NAMES[0]) == bytes(68)  # which is a use of it
    with caplog.at_level("INFO", logger="jaxllm"):
        keep_within(399)
    assert left(folder) == [NAMES[0], *NAMES[3:]]
    assert "JAXLLM_CACHE_SIZE" in caplog.text
    keep_within(0)
    assert left(folder) == [] and models.exists() and (folder / "xla" / "jax-1" / "start_times.json").exists()


def test_what_somebody_writes_stays_and_what_nobody_finished_goes(folder: Path):
    being_written, abandoned = (folder / "xla" / "jax-1" / f"{kept_files.UNFINISHED}{name}" for name in "ab")
    for path in (being_written, abandoned):
        path.write_bytes(bytes(9))
    os.utime(abandoned, (LONG_AGO - 1, LONG_AGO - 1))
    keep_within(500)
    assert being_written.exists() and not abandoned.exists() and left(folder) == list(NAMES)


def test_several_processes_remove_and_write_at_the_same_time(folder: Path):
    """None of them fails, and none reads a part of a file."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jaxllm.startup.cache_bound import keep_within\n"
        "from pallas_kernels import kept_files\n"
        "for turn in range(60):\n"
        "    path = Path(sys.argv[1]) / 'xla' / f'{turn % 7}.program'\n"
        "    content = str(turn % 7).encode() * 5000\n"
        "    try:\n"
        "        assert kept_files.read(path) == content\n"
        "    except FileNotFoundError:\n"
        "        kept_files.write(path, content)\n"
        "    keep_within(12000 + turn % 2)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert sum(path.stat().st_size for path in folder.rglob("*.*")) <= 3 * 5000 + 12001


def test_all_files_are_looked_at_once_a_day(folder: Path):
    keep_within(500)
    kept_files.write(folder / "xla" / "new.program", bytes(68))
    keep_within(500)
    assert left(folder) == list(NAMES)
    os.utime(folder / "bound", (LONG_AGO, LONG_AGO))
    keep_within(500)
    assert left(folder) == list(NAMES[1:])
    keep_within(400)
    assert left(folder) == list(NAMES[2:])


def test_a_folder_that_cannot_be_looked_at_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the system says of it: here its name is too long, elsewhere it lies in another user's home."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / ("x" * 300)))
    keep_within(0)
    assert list(tmp_path.iterdir()) == []


def test_the_bound_is_the_environments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAXLLM_CACHE_SIZE", raising=False)
    assert cache_bound() == 10 * 10**9
    for given, expected in (("500MB", 500 * 10**6), ("none", None), ("0", 0)):
        monkeypatch.setenv("JAXLLM_CACHE_SIZE", given)
        assert cache_bound() == expected
    monkeypatch.setenv("JAXLLM_CACHE_SIZE", "much")
    with pytest.raises(ValidationError, match="JAXLLM_CACHE_SIZE must be a number of bytes"):
        cache_bound()


def test_the_folders_are_those_that_starts_fill():
    assert FOLDERS == (compile_cache().parent.name, "kernels", kept_tokenizers().name)

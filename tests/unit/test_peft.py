"""Adapters' files: what is read of a folder, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.config.lora import LoRAConfig
from jaxllm.models.adapters import Module
from jaxllm.weights.peft import PeftReader

MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = LoRAConfig(max_loras=1, max_lora_rank=8, max_cpu_loras=1, dtype="float32")
READER = PeftReader({MODULE: Module(6, 5, ())}, "model.", CONFIG)
A, B = np.full((2, 5), 3.0, np.float32), np.full((6, 2), 7.0, np.float32)


def write(folder: Path, a: np.ndarray = A, b: np.ndarray = B, **config: Any) -> LoRARequest:
    folder.mkdir(exist_ok=True)
    names = (f"base_model.model.{MODULE}.lora_{half}.weight" for half in "AB")
    save_file(dict(zip(names, (a, b), strict=True)), folder / "adapter_model.safetensors")
    asked = {"peft_type": "LORA", "r": a.shape[0] if a.ndim else 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(asked))
    return LoRARequest("mine", 1, folder)


def test_other_files_of_the_folder_are_none_of_the_adapters(tmp_path: Path):
    request = write(tmp_path)
    for name in ("model.safetensors", "optimizer.safetensors"):
        save_file({"model.embed_tokens.weight": A}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    ((a, b),) = READER.open(request).read().values()
    np.testing.assert_array_equal(a, A)
    np.testing.assert_array_equal(b, B)


def test_files_that_have_changed_since_they_were_checked(tmp_path: Path):
    files = READER.open(write(tmp_path))
    assert not files.have_changed()
    # a row less, which nobody has checked
    write(tmp_path, b=B[:5])
    assert files.have_changed()
    with pytest.raises(ValidationError, match="'mine' .* has changed since it was loaded.* load_inplace=True"):
        files.read()
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValidationError, match="'mine' .* has changed since it was loaded"):
        files.read()


def test_numbers_that_change_alone_are_seen_too(tmp_path: Path):
    files = READER.open(write(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert files.have_changed()


#: what an adapter is made of, and what is said of it
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"a": np.zeros((), np.float32)}, r"lora_A \[\] and lora_B \[6, 2\]"),
    "no rank": ({"a": A[:0], "b": B[:, :0]}, r"lora_A \[0, 5\] and lora_B \[6, 0\].* r at least 1"),
    "a pattern": ({"alpha_pattern": {"q_(proj": 3}}, r"alpha_pattern has 'q_\(proj', which is no regular expression"),
    "a text": ({"alpha_pattern": {"q_proj": "3"}}, "alpha_pattern of 'q_proj' must be a number, got '3'"),
    "an enormous scale": ({"lora_alpha": 10**400}, "cannot be read: .* too large"),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights='pissa_niter_4' .* changed the model .* path_in",
    ),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, "init_lora_weights='OLoRA' is not supported"),
    "a list": ({"rank_pattern": ["q_proj"]}, r"rank_pattern must be an object, got \['q_proj'\]"),
}


@pytest.mark.parametrize("problem", MALFORMED)
def test_malformed_adapters_are_refused(tmp_path: Path, problem: str):
    made, said = MALFORMED[problem]
    with pytest.raises(ValidationError, match=f"'mine' .*{said}"):
        READER.open(write(tmp_path, **made))


def test_a_folder_with_a_name_that_no_system_takes_fails_as_an_adapter():
    with pytest.raises(ValidationError, match="'mine' .* cannot be read"):
        READER.open(LoRARequest("mine", 1, "a\0b"))


def test_a_copy_with_its_originals_time_and_other_shapes_is_not_read(tmp_path: Path):
    request = write(tmp_path)
    files = READER.open(request)
    # as large as before, and without what tells it from the other one
    save = {f"base_model.model.{MODULE}.lora_{half}.weight": x.T.copy() for half, x in (("A", A), ("B", B))}
    file = tmp_path / "adapter_model.safetensors"
    stat = file.stat()
    save_file(save, tmp_path / "copy")
    file.write_bytes((tmp_path / "copy").read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not files.have_changed()
    with pytest.raises(ValidationError, match="has changed since it was loaded"):
        files.read()


@pytest.mark.parametrize(("dtype", "half", "number"), [("float32", "a", np.nan), ("float16", "b", 1e5)])
def test_numbers_that_would_not_be_finite_on_the_device(tmp_path: Path, dtype: str, half: str, number: float):
    matrices = {"a": A.copy(), "b": B.copy()}
    matrices[half][0, 0] = number
    reader = PeftReader({MODULE: Module(6, 5, ())}, "model.", dataclasses.replace(CONFIG, dtype=dtype))
    files = reader.open(write(tmp_path, **matrices))
    said = f"lora_{half.upper()} of .*q_proj' has numbers that are not finite, or not in {dtype}"
    with pytest.raises(ValidationError, match=said):
        files.read()

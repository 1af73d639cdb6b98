"""Adapters' files: what is read of a folder, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.config.lora import LoRAConfig
from jaxllm.models.adapters import EMBEDDING, HEAD, Module, Table
from jaxllm.weights.peft import OwnTable, PeftReader

MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = LoRAConfig(max_loras=1, max_lora_rank=8, max_cpu_loras=1, dtype="float32")
TABLES = {"model.embed_tokens": Table(EMBEDDING, (9, 5)), "lm_head": Table(HEAD, (9, 5))}


def reader_of(**config: Any) -> PeftReader:
    return PeftReader({MODULE: Module(6, 5, ())}, TABLES, "model.", dataclasses.replace(CONFIG, **config), "bfloat16")


READER = reader_of()
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
    (found,) = READER.open(request).read().values()
    assert not isinstance(found, OwnTable)
    a, b = found
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
    reader = reader_of(dtype=dtype)
    files = reader.open(write(tmp_path, **matrices))
    said = f"lora_{half.upper()} of .*q_proj' has numbers that are not finite, or not in {dtype}"
    with pytest.raises(ValidationError, match=said):
        files.read()


def with_tensors(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> LoRARequest:
    """An adapter that has these, too."""
    request = write(folder, **config)
    file = folder / "adapter_model.safetensors"
    more = {f"base_model.model.{name}": array for name, array in tensors.items()}
    save_file({**load_file(file), **more}, file)
    return request


def test_tables_whole_and_changed(tmp_path: Path):
    table = np.arange(45, dtype=np.float32).reshape(9, 5)
    of_embedding = {
        "lora_embedding_A": np.full((2, 9), 2.0, np.float32),
        "lora_embedding_B": np.ones((5, 2), np.float32),
    }
    tensors = {f"model.embed_tokens.{name}": array for name, array in of_embedding.items()}
    # PEFT saves what an embedding was before it was changed, too
    tensors |= {"model.embed_tokens.base_layer.weight": table, "lm_head.weight": table + 1}
    found = reader_of(has_tables=True).open(with_tensors(tmp_path, tensors, lora_alpha=6)).read()
    embedding, head = found["model.embed_tokens"], found["lm_head"]
    assert isinstance(embedding, OwnTable) and isinstance(head, OwnTable) and len(found) == 3
    assert embedding.whole is not None and embedding.rows is not None and embedding.columns is not None
    # 6 / 2 times B @ A, which is 2 * 2 everywhere
    np.testing.assert_array_equal(embedding.whole + embedding.rows @ embedding.columns, table + 12)
    np.testing.assert_array_equal(head.whole, table + 1)
    assert head.rows is head.columns is None


def test_patterns_go_by_the_names_that_the_file_has(tmp_path: Path):
    """Of a model that sees, PEFT's names have another beginning than those of its text by itself."""
    name, full = "model.embed_tokens", "model.language_model.embed_tokens"
    ones = {"A": np.ones((2, 9), np.float32), "B": np.ones((5, 2), np.float32)}
    tensors = {f"{full}.lora_embedding_{half}": array for half, array in ones.items()}
    request = with_tensors(tmp_path, tensors, lora_alpha=2, alpha_pattern={full: 8})
    table = reader_of(has_tables=True).open(request).read()[name]
    assert isinstance(table, OwnTable) and table.rows is not None
    np.testing.assert_array_equal(table.rows, np.full((9, 2), 4.0))


@pytest.mark.parametrize(
    ("tensors", "config", "has_tables", "said"),
    [
        ({"lm_head.weight": np.ones((9, 5), np.float32)}, {}, False, "lm_head.*Set lora_embeddings=True"),
        ({}, {"modules_to_save": ["embed_tokens"]}, False, "embed_tokens.*Set lora_embeddings=True"),
        ({}, {"modules_to_save": ["lm_head", "score"]}, True, "has 'score', which is not supported.*embed_tokens"),
        ({}, {"modules_to_save": ["embed_tokens"]}, True, "and the file has no 'embed_tokens'"),
        ({"lm_head.weight": np.ones((11, 5), np.float32)}, {}, True, "Its 2 added tokens are not supported"),
        ({"lm_head.weight": np.ones((9, 4), np.float32)}, {}, True, r"is of \[9, 4\], and the model's is \[9, 5\]"),
        (
            {"lm_head.lora_A.weight": np.ones((2, 5), np.float32)},
            {},
            True,
            "one of lora_A and lora_B, and not the other",
        ),
        ({"model.norm.weight": np.ones(5, np.float32)}, {}, True, "the tensor .*norm.weight' is not supported"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, tensors: dict, config: dict, has_tables: bool, said: str):
    with pytest.raises(ValidationError, match=said):
        reader_of(has_tables=has_tables).open(with_tensors(tmp_path, tensors, **config))

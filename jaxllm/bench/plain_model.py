"""A quantized model as the same values in one plain dtype, for engines that are compared in that dtype."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from filelock import FileLock

from jaxllm.api.errors import ValidationError
from jaxllm.config.cache_folder import cache_folder
from jaxllm.weights.formats.gguf import GGUFReader

#: as safetensors names them
_DTYPES = {"bfloat16": ("BF16", ml_dtypes.bfloat16), "float16": ("F16", np.float16), "float32": ("F32", np.float32)}


def plain_folder(model: Path, dtype: str) -> Path:
    """A Hugging Face folder of the model: its own one, or one that is made of a .gguf file and kept in the cache."""
    if model.is_dir():
        return model
    folder = _place(model, dtype)
    with FileLock(folder.with_suffix(".lock")):
        # the config is written last: where it is, everything is
        if not (folder / "config.json").exists():
            folder.mkdir(exist_ok=True)
            with GGUFReader(model) as reader:
                write_safetensors(reader, folder / "model.safetensors", dtype)
                config = {**reader.config(), "torch_dtype": dtype}
            (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def plain_gguf(model: Path, dtype: str, python: str) -> Path:
    """A .gguf file of the model in `dtype`, made of another one by an interpreter that has the package gguf.

    Raises ValidationError for a model that is no .gguf file, and where the package is missing.
    """
    if model.is_dir():
        raise ValidationError(
            f"llama.cpp reads .gguf files, and {model} is a folder: convert it, and pass --gguf FILE."
        )
    target = _place(model, dtype) / "model.gguf"
    with FileLock(target.parent.with_suffix(".lock")):
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            unfinished = target.with_suffix(".part")
            script = Path(__file__).parent / "peers" / "convert_gguf.py"
            done = subprocess.run([python, str(script), str(model), dtype, str(unfinished)], stderr=subprocess.PIPE)
            if done.returncode:
                log = done.stderr.decode(errors="replace")[-500:]
                raise ValidationError(
                    f"{model} was not converted to {dtype} for llama.cpp: {log}\n"
                    f"That takes the package gguf ({python} -m pip install gguf); or pass --gguf FILE."
                )
            os.replace(unfinished, target)
    return target


def write_safetensors(reader: GGUFReader, path: Path, dtype: str) -> None:
    """Write all tensors under their Hugging Face names, one at a time (huggingface.co/docs/safetensors, "Format")."""
    name, kind = _DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.names():
        begin, end = end, end + math.prod(reader.shape(tensor)) * np.dtype(kind).itemsize
        header[tensor] = {"dtype": name, "shape": list(reader.shape(tensor)), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in reader.names():
            file.write(np.ascontiguousarray(reader.read(tensor).astype(kind)).tobytes())


def gguf_python(peer_python: str) -> str:
    """An interpreter that has the package gguf, if one of the two does: this one, or the peer's."""
    import importlib.util

    return sys.executable if importlib.util.find_spec("gguf") else peer_python


def _place(model: Path, dtype: str) -> Path:
    stat = model.stat()
    folder = cache_folder() / "bench" / f"{model.stem}-{stat.st_size}-{stat.st_mtime_ns}-{dtype}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder

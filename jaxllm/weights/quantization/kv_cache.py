"""In which numbers a checkpoint wants its keys and values to be kept.

llm-compressor says it in ``kv_cache_scheme``, which is a scheme as weights have one, or "static" in its first versions;
ModelOpt says it in ``kv_cache_quant_algo``, in a file of its own or in config.json; Quark in what the modules of
``kv_cache_group`` give out. All come with scales of whole matrices (`KV_SCALES`), which are not read: pages have a
scale for each key and each value of a head.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

#: by what ModelOpt and the first llm-compressor say, and by (type, num_bits) of a scheme
_KNOWN: Mapping[Any, str] = {
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "static": "fp8_e4m3",
    "int8": "int8",
    ("float", 8): "fp8_e4m3",
    ("int", 8): "int8",
}
#: what the names of those scales end with, in checkpoints of all ages
KV_SCALES = (
    *(".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale", ".k_zero_point", ".v_zero_point"),
    *(".q_proj.output_scale", ".k_proj.output_scale", ".v_proj.output_scale"),
)
_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_dtype")


def wanted_kv_cache(config: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """What a quantization_config says of the KV cache.

    Returns:
        (wanted, said): a value of the engine's `kv_cache_dtype`, None where there is none for it, and what the config
        says, None where it says nothing.
    """
    for key in _KEYS:
        said = (config or {}).get(key)
        if not said or (isinstance(said, str) and said.lower() in ("auto", "none")):
            continue
        asked = said.lower() if isinstance(said, str) else None
        if isinstance(said, Mapping):
            asked = said.get("type", "int"), said.get("num_bits", 8)
        return _KNOWN.get(asked), f"{key}={said!r}"
    said = _of_quark(config or {})
    return (None, None) if said is None else (_KNOWN.get(said), f"the dtype of kv_cache_group's outputs={said!r}")


def _of_quark(config: Mapping[str, Any]) -> str | None:
    """The dtype of what the first of Quark's modules that make keys and values gives out; None: as they are."""
    modules = {**(config.get("layer_quant_config") or {}), **(config.get("kv_cache_quant_config") or {})}
    for group in (config.get("export") or {}).get("kv_cache_group") or ():
        for name in fnmatch.filter(modules, group):
            outputs = (modules[name] or {}).get("output_tensors")
            for one in filter(None, outputs if isinstance(outputs, list) else [outputs]):
                return str(one.get("dtype")).lower()
    return None

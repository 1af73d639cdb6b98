"""Tiny checkpoints in each quantized format, packed from the formats' definitions number by number, and what their
matrices are in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from support.tiny_model import CONFIG, write_tiny_model

from jaxllm.weights.formats.tensor_files import TensorFiles

Tensors = dict[str, np.ndarray]
#: (the tensors of a matrix behind its module's name, what it is)
Packed = tuple[Tensors, np.ndarray]
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def as_stream(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of a row one after the other in 32-bit words, from the lowest bit: i32 [rows, words]."""
    words = -(-numbers.shape[1] * bits // 32)
    rows = (sum(int(number) << (bits * i) for i, number in enumerate(row)) for row in numbers)
    return np.stack([np.frombuffer(row.to_bytes(words * 4, "little"), np.int32) for row in rows])


def _codes(shape: tuple[int, ...], bits: int, random: np.random.Generator) -> np.ndarray:
    return random.integers(0, 1 << bits, shape)


def _scales(shape: tuple[int, ...], bits: int, random: np.random.Generator, dtype: Any = np.float16) -> np.ndarray:
    return (random.uniform(0.5, 1.5, shape) * 0.3 / (1 << bits)).astype(dtype)


def _spread(of_group: np.ndarray, columns: int) -> np.ndarray:
    """[rows, groups] -> [rows, columns], float32."""
    return np.repeat(of_group.astype(np.float32), columns // of_group.shape[1], axis=1)


def awq(rows: int, columns: int, random: np.random.Generator) -> Packed:
    codes, zeros = _codes((rows, columns), 4, random), _codes((rows, columns // GROUP), 4, random)
    scales = _scales(zeros.shape, 4, random)

    def words(numbers: np.ndarray) -> np.ndarray:
        """[rows, n] -> i32 [n, rows / 8]"""
        taken = numbers.T.reshape(numbers.shape[1], -1, 8)[:, :, AWQ_ORDER]
        return np.concatenate([as_stream(taken[:, i], 4) for i in range(taken.shape[1])], axis=1)

    tensors = {"qweight": words(codes), "qzeros": words(zeros), "scales": np.ascontiguousarray(scales.T)}
    return tensors, (codes - _spread(zeros, columns)) * _spread(scales, columns)


def gptq(
    bits: int, *, v2: bool = False, act_order: bool = False, symmetric: bool = False
) -> Callable[[int, int, np.random.Generator], Packed]:
    def pack(rows: int, columns: int, random: np.random.Generator) -> Packed:
        codes, zeros = _codes((rows, columns), bits, random), _codes((rows, columns // GROUP), bits, random)
        if symmetric:
            zeros[:] = 1 << (bits - 1)
        scales = _scales(zeros.shape, bits, random)
        of_column = np.arange(columns) // GROUP
        if act_order:
            # the same for all matrices of the same input
            of_column = np.random.default_rng(columns).permutation(of_column)
        stored = as_stream(zeros.T, bits)
        if not v2 and bits == 3:
            stored = as_stream((zeros.T - 1) & 7, bits)
        elif not v2:
            ones = as_stream(np.ones_like(zeros.T), bits)
            stored = (stored.view(np.uint32) - ones.view(np.uint32)).view(np.int32)
        tensors = {
            "qweight": np.ascontiguousarray(as_stream(codes, bits).T),
            "qzeros": stored,
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": of_column.astype(np.int32),
        }
        wide = scales.astype(np.float32)[:, of_column]
        return tensors, (codes - zeros[:, of_column]).astype(np.float32) * wide

    return pack


def _float8(rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    return random.normal(0, 60, (rows, columns)).astype(ml_dtypes.float8_e4m3fn)


def fp8(kind: str) -> Callable[[int, int, np.random.Generator], Packed]:
    def pack(rows: int, columns: int, random: np.random.Generator) -> Packed:
        weight = _float8(rows, columns, random)
        if kind == "blocks":
            scales = random.uniform(1e-3, 3e-3, (-(-rows // 48), -(-columns // 48))).astype(np.float32)
            wide = np.repeat(np.repeat(scales, 48, 0)[:rows], 48, 1)[:, :columns]
            return {"weight": weight, "weight_scale_inv": scales}, weight.astype(np.float32) * wide
        shape = {"tensor": (), "row": (rows, 1)}[kind]
        scales = random.uniform(1e-3, 3e-3, shape).astype(np.float32)
        tensors = {"weight": weight, "weight_scale": np.asarray(scales)}
        if kind == "tensor":
            tensors["input_scale"] = np.asarray(0.02, np.float32)
        return tensors, weight.astype(np.float32) * scales

    return pack


def fp8_blocks(axes: int) -> Callable[[int, int, np.random.Generator], Packed]:
    """As compressed-tensors has them, with two axes; with the four of ModelOpt's, of a matrix that is one block."""

    def pack(rows: int, columns: int, random: np.random.Generator) -> Packed:
        tensors, wide = fp8("blocks" if axes == 2 else "tensor")(rows, columns, random)
        scales = tensors.pop("weight_scale_inv") if axes == 2 else tensors["weight_scale"].reshape(1, 1, 1, 1)
        return {"weight": tensors["weight"], "weight_scale": scales}, wide

    return pack


def int8(rows: int, columns: int, random: np.random.Generator) -> Packed:
    weight = random.integers(-127, 128, (rows, columns)).astype(np.int8)
    scales = _scales((rows, 1), 8, random, ml_dtypes.bfloat16)
    return {"weight": weight, "weight_scale": scales}, weight.astype(np.float32) * scales.astype(np.float32)


def packed(bits: int, *, symmetric: bool) -> Callable[[int, int, np.random.Generator], Packed]:
    def pack(rows: int, columns: int, random: np.random.Generator) -> Packed:
        codes = _codes((rows, columns), bits, random)
        scales = _scales((rows, columns // GROUP), bits, random, ml_dtypes.bfloat16)
        zeros = np.full(scales.shape, 1 << (bits - 1)) if symmetric else _codes(scales.shape, bits, random)
        tensors = {
            "weight_packed": as_stream(codes, bits),
            "weight_scale": scales,
            "weight_shape": np.array([rows, columns], np.int64),
        }
        if not symmetric:
            tensors["weight_zero_point"] = np.ascontiguousarray(as_stream(zeros.T, bits).T)
        return tensors, (codes - _spread(zeros, columns)) * _spread(scales, columns)

    return pack


def nf4(rows: int, columns: int, random: np.random.Generator) -> Packed:
    codes = _codes((rows * columns,), 4, random)
    blocks = -(-rows * columns // 64)
    nested_map = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
    nested, offset = random.integers(0, 256, blocks).astype(np.uint8), 0.11
    outer = random.uniform(0.01, 0.05, -(-blocks // 256)).astype(np.float32)
    largest = nested_map[nested] * outer[np.arange(blocks) // 256] + np.float32(offset)
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [rows, columns], "dtype": "bfloat16"}
    state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
    tensors = {
        "weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8).reshape(-1, 1),
        "weight.absmax": nested,
        "weight.quant_map": NF4,
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": nested_map,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    return tensors, (NF4[codes] * largest[np.arange(rows * columns) // 64]).reshape(rows, columns)


def scb(rows: int, columns: int, random: np.random.Generator) -> Packed:
    weight = random.integers(-127, 128, (rows, columns)).astype(np.int8)
    largest = random.uniform(0.2, 0.4, rows).astype(np.float32)
    tensors = {"weight": weight, "SCB": largest, "weight_format": np.array(0, np.uint8)}
    return tensors, weight.astype(np.float32) * (largest[:, None] * np.float32(1 / 127))


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def float4(kind: str) -> Callable[[int, int, np.random.Generator], Packed]:
    """NVFP4 of compressed-tensors ("nvfp4") and of ModelOpt ("modelopt"); MXFP4 ("mxfp4"), and as Quark has it."""

    def pack(rows: int, columns: int, random: np.random.Generator) -> Packed:
        codes, group = _codes((rows, columns), 4, random), 16 if kind in ("nvfp4", "modelopt") else 32
        tensors: Tensors = {"weight": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)}
        if kind in ("nvfp4", "mxfp4"):
            tensors["weight_packed"] = tensors.pop("weight")
        if group == 32:
            exponents = random.integers(118, 124, (rows, columns // group)).astype(np.uint8)
            tensors["weight_scale"] = exponents
            return tensors, E2M1[codes] * _spread(2.0 ** (exponents.astype(np.float32) - 127), columns)
        tensors["weight_scale"] = random.uniform(20, 400, (rows, columns // group)).astype(ml_dtypes.float8_e4m3fn)
        scales = tensors["weight_scale"].astype(np.float32)
        factor = np.float32(random.uniform(1e-4, 2e-4))
        if kind == "nvfp4":
            tensors["weight_global_scale"] = 1 / factor.reshape(1)
            factor = 1 / tensors["weight_global_scale"]
        else:
            tensors["weight_scale_2"] = np.asarray(factor)
        tensors["input_global_scale" if kind == "nvfp4" else "input_scale"] = np.ones(1, np.float32)
        return tensors, E2M1[codes] * _spread(scales * factor, columns)

    return pack


def mxfp8(rows: int, columns: int, random: np.random.Generator) -> Packed:
    exponents = random.integers(112, 118, (rows, columns // 32)).astype(np.uint8)
    weight = _float8(rows, columns, random)
    wide = weight.astype(np.float32) * _spread(2.0 ** (exponents.astype(np.float32) - 127), columns)
    return {"weight": weight, "weight_scale": exponents}, wide


def unpacked(rows: int, columns: int, random: np.random.Generator) -> Packed:
    """Four bits, a byte each."""
    weight = (_codes((rows, columns), 4, random) - 8).astype(np.int8)
    scales = _scales((rows, columns // GROUP), 4, random, ml_dtypes.bfloat16)
    return {"weight": weight, "weight_scale": scales}, weight.astype(np.float32) * _spread(scales, columns)


def quark_groups(dtype: str, *, is_old: bool = False) -> Callable[[int, int, np.random.Generator], Packed]:
    """Integers of Quark in groups, transposed; "uint4" in AWQ's order with zero points, others symmetric."""

    def pack(rows: int, columns: int, random: np.random.Generator) -> Packed:
        bits = 8 if dtype == "int8" else 4
        codes = _codes((rows, columns), bits, random) - (0 if dtype == "uint4" else 1 << (bits - 1))
        zeros = _codes((rows, columns // GROUP), bits, random) * (dtype == "uint4")
        scales = _scales(zeros.shape, bits, random, ml_dtypes.bfloat16)
        tensors: Tensors = {"weight_scale": np.ascontiguousarray(scales if is_old else scales.T)}
        if bits == 8:
            tensors["weight"] = np.ascontiguousarray(codes.T.astype(np.int8))
        else:
            order = AWQ_ORDER if dtype == "uint4" else range(8)
            for name, numbers in (("weight", codes), ("weight_zero_point", zeros)):
                words = (numbers & 15).T.reshape(numbers.shape[1], -1, 8)[:, :, order]
                tensors[name] = np.ascontiguousarray(as_stream(words.reshape(len(words), -1), 4))
        return tensors, (codes - _spread(zeros, columns)) * _spread(scales, columns)

    return pack


def _compressed(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _quark(weight: Mapping[str, Any], pack_method: str = "reorder") -> dict[str, Any]:
    """Inputs are as weights, static where the matrix has one scale; beside integers in groups as they are."""
    dynamic = weight["qscheme"] != "per_tensor"
    is_alone = weight["qscheme"] == "per_group" and "int" in weight["dtype"]
    inputs = {"dtype": "bfloat16"} if is_alone else {**weight, "is_dynamic": dynamic}
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": dict(weight), "input_tensors": inputs, "output_tensors": None},
        "layer_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"weight_format": "real_quantized", "pack_method": pack_method, "kv_cache_group": []},
    }


_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
_GROUPS = {"strategy": "group", "group_size": GROUP, "type": "int"}
#: by a name: quantization_config, and how a matrix is packed
FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq),
    **{
        f"gptq {bits} bits": ({"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False}, gptq(bits))
        for bits in (2, 3, 4, 8)
    },
    "gptq 8 bits symmetric": (
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": True},
        gptq(8, symmetric=True),
    ),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        gptq(4, v2=True),
    ),
    "gptq act-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
        gptq(4, act_order=True),
    ),
    "fp8 static": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8("tensor")),
    "fp8 rows": ({"quant_method": "fbgemm_fp8"}, fp8("row")),
    "fp8 blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 48]},
        fp8("blocks"),
    ),
    "int8": (
        _compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, {**_TOKEN, "type": "int"}, "int-quantized"),
        int8,
    ),
    "float8": (
        _compressed(
            {"num_bits": 8, "type": "float", "strategy": "channel"}, {**_TOKEN, "type": "float"}, "float-quantized"
        ),
        fp8("row"),
    ),
    **{
        f"packed {bits} bits{'' if symmetric else ' with zeros'}": (
            _compressed({**_GROUPS, "num_bits": bits, "symmetric": symmetric}, None, "pack-quantized"),
            packed(bits, symmetric=symmetric),
        )
        for bits, symmetric in ((4, True), (4, False), (8, True), (8, False), (3, True))
    },
    # W4A8: inputs in eight bits beside weights of four
    "packed 4 bits by int8": (
        _compressed({**_GROUPS, "num_bits": 4, "symmetric": True}, {**_TOKEN, "type": "int"}, "pack-quantized"),
        packed(4, symmetric=True),
    ),
    "packed 4 bits by float8": (
        _compressed({**_GROUPS, "num_bits": 4, "symmetric": True}, {**_TOKEN, "type": "float"}, "pack-quantized"),
        packed(4, symmetric=True),
    ),
    "unpacked 4 bits": (
        _compressed({**_GROUPS, "num_bits": 4}, {**_TOKEN, "type": "int"}, "int-quantized"),
        unpacked,
    ),
    # which columns of no matrix fill
    "fp8 blocks of compressed-tensors": (
        _compressed(
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 48]},
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 48, "dynamic": True},
            "float-quantized",
        ),
        fp8_blocks(2),
    ),
    "nvfp4": (
        _compressed(
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
            "nvfp4-pack-quantized",
        ),
        float4("nvfp4"),
    ),
    "dense mxfp4": (
        _compressed(
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, None, "mxfp4-pack-quantized"
        ),
        float4("mxfp4"),
    ),
    "mxfp8": (
        _compressed({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}, None, "mxfp8-quantized"),
        mxfp8,
    ),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, fp8("tensor")),
    # blocks that are no larger than the model's matrices
    "modelopt fp8 block scales": (
        {"quant_method": "modelopt", "quant_algo": "FP8_BLOCK_SCALES", "group_size": 48},
        fp8("blocks"),
    ),
    "modelopt fp8 blocks": ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, fp8_blocks(4)),
    "modelopt nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head*"]},
        float4("modelopt"),
    ),
    "quark fp8": (
        _quark({"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}),
        fp8("tensor"),
    ),
    "quark int8": (
        _quark({"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True}),
        int8,
    ),
    "quark mxfp4": (
        _quark({"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}),
        float4("quark"),
    ),
    **{
        f"quark {dtype} in groups": (
            _quark(
                {"dtype": dtype, "qscheme": "per_group", "group_size": GROUP, "symmetric": dtype != "uint4"},
                "order" if dtype == "int4" else "reorder",
            ),
            quark_groups(dtype, is_old=dtype == "int4"),
        )
        for dtype in ("uint4", "int4", "int8")
    },
    "auto-round": (
        {
            **{"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False, "data_type": "int"},
            **{"packing_format": "auto_round:auto_gptq", "extra_config": {"lm_head": {"bits": 16}}},
        },
        gptq(4),
    ),
    "auto-round awq": (
        {
            **{"quant_method": "intel/auto-round", "bits": 4, "group_size": GROUP, "sym": False},
            **{"packing_format": "auto_round:auto_awq"},
        },
        awq,
    ),
    **{
        f"auto-round {name}": (
            {
                **{
                    "quant_method": "auto-round",
                    "bits": bits,
                    "data_type": data_type,
                    "group_size": group,
                    "sym": True,
                },
                **{"packing_format": "auto_round:llm_compressor", **own},
            },
            pack,
        )
        for name, bits, data_type, group, own, pack in (
            ("fp8", 8, "fp", -1, {"act_bits": 8, "act_dynamic": True}, fp8("row")),
            ("fp8 static", 8, "fp8_e4m3", 0, {"act_bits": 8, "act_dynamic": False}, fp8("tensor")),
            ("mxfp4", 4, "mx_fp", 32, {"act_bits": 4, "act_data_type": "mx_fp"}, float4("mxfp4")),
            ("mxfp8", 8, "mx_fp_rceil", 32, {"act_bits": 8, "act_data_type": "mx_fp"}, mxfp8),
            ("nvfp4", 4, "nv_fp4_with_static_gs", 16, {"act_bits": 4}, float4("nvfp4")),
        )
    },
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, scb),
}


def write(
    folder: Path, name: str, *, left_out: str = "lm_head", changes: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """The tiny model in a format, and what its matrices are, in float32: two directories.

    Args:
        left_out: matrices with this in their name are not quantized.
        changes: fields of the model's config.json.
    """
    (folder / "dense").mkdir()
    write_tiny_model(folder / "dense")
    (folder / "dense" / "config.json").write_text(json.dumps({**CONFIG, **(changes or {})}))
    return quantized(folder, name, (left_out,)), folder / "dense"


def quantized(folder: Path, name: str, left_out: tuple[str, ...]) -> Path:
    """The model in ``folder / "dense"`` in a format, whose matrices become what they are there: another directory.

    Args:
        left_out: matrices with one of these in their name are not quantized.
    """
    config, pack = FORMATS[name]
    random = np.random.default_rng(3)
    made = folder / f"quantized {name}"
    shutil.copytree(folder / "dense", made)
    with TensorFiles(folder / "dense") as reader:
        dense = {name: reader.read(name).copy() for name in reader.names()}
    tensors: Tensors = {}
    for tensor, value in list(dense.items()):
        module = tensor.removesuffix(".weight")
        if not module.endswith("_proj") or any(part in module for part in left_out):
            tensors[tensor] = value
            continue
        stored, matrix = pack(*value.shape, random)
        tensors.update({f"{module}.{end}": array for end, array in stored.items()})
        dense[tensor] = np.ascontiguousarray(matrix.astype(np.float32))
    save_file(dense, folder / "dense" / "model.safetensors")
    save_file(tensors, made / "model.safetensors")
    model = json.loads((folder / "dense" / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**model, "quantization_config": config}))
    return made

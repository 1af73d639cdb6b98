"""`jaxllm.quantize` writes a model with quantized weights."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jaxllm.api.errors import ValidationError
from jaxllm.engine.interrupt import StartInterrupt
from jaxllm.layers.weight import is_spec
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.matrices import SMALL_FIELDS, matrices, quantized
from jaxllm.models.params import Params
from jaxllm.models.registry import is_encoder, model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import device_bytes
from jaxllm.quantizing.layer import quantize_layer
from jaxllm.quantizing.model_layers import ModelLayers, is_matrix
from jaxllm.quantizing.report import MatrixError, QuantizationReport
from jaxllm.quantizing.scheme import CALIBRATED, MatrixForms, Scheme
from jaxllm.quantizing.text import Samples, read_samples
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights import saved_model
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.shards import ShardWriter
from jaxllm.weights.new_folder import appearing
from jaxllm.weights.resolve import resolve

logger = logging.getLogger("jaxllm")

DTYPES = ("bfloat16", "float16", "float32")
NUM_SAMPLES, SEQUENCE_LENGTH = 128, 512


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    method: str,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    desc_act: bool = False,
    ignore: Sequence[str] = (),
    calibration: str | os.PathLike[str] | None = None,
    num_samples: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    dtype: str = "auto",
    perplexity: bool = True,
    progress: bool = True,
    revision: str | None = None,
    hf_token: str | bool | None = None,
) -> QuantizationReport:
    """Write a model with quantized weights, as safetensors and a config.json in the layouts of the field's formats.

    One layer after the other is read, quantized and let go: the model is never in memory as a whole. Embeddings and
    head stay as they are, and so do norms, biases and routers.

    Args:
        model: as the engine takes it; weights in 16 or 32 bits, or a GGUF file, whose values are widened first.
        output: a directory, which appears when all of it is written.
        method: "awq" or "gptq", which look at text; "int8", "fp8" or "int4" (as compressed-tensors), which round to
            the nearest number.
        bits: 4; GPTQ's may be 2, 3, 4 or 8.
        group_size: columns that share a scale, -1: all of a row; None: 128, or else 64 or 32 where that divides rows.
        symmetric: whether there are no zero points; None: none for GPTQ, there are for AWQ and int4.
        desc_act: GPTQ's act-order: columns with large inputs first.
        ignore: matrices that stay as they are, by their modules' names, or ``re:`` and a regular expression that
            matches the beginning of the name.
        calibration: a text, or a .jsonl file (`text.read_samples`); None: Python's documentation of its own language.
        num_samples: how many sequences AWQ and GPTQ look at; None: 128.
        sequence_length: how many tokens a sequence has.
        seed: of which sequences these are.
        dtype: of what is not quantized; "auto": as the checkpoint has it.
        perplexity: measure it, before and after, on text that calibration does not see.
        progress: show a bar on stderr.
        revision, hf_token: of a hub's model.

    Raises:
        ValidationError: a choice that the method, the model or the format does not have.
        WeightsError: the checkpoint cannot be used, something is in `output`, or there is no room for it.
        FileNotFoundError: there is no such model.
    """
    scheme = Scheme(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        desc_act=desc_act,
        ignore=tuple(ignore),
    )
    needs_text = perplexity or method in CALIBRATED
    for name, value, least in (("num_samples", num_samples, 1), ("sequence_length", sequence_length, 2)):
        if value is not None and value < least:
            raise ValidationError(f"{name} must be at least {least}, got {value}.")
    for name, value, unused in (
        ("num_samples", num_samples, method not in CALIBRATED),
        ("calibration", calibration, not needs_text),
    ):
        if value is not None and unused:
            logger.warning("%s=%r has no effect: method=%r looks at no text", name, value, method)
    if dtype not in ("auto", *DTYPES):
        raise ValidationError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}.")
    checkpoint = Checkpoint(resolve(model, revision=revision, token=hf_token, progress=progress))
    config = _readable(checkpoint)
    layers = ModelLayers(checkpoint, config, _dtype(dtype, checkpoint))
    longest = config.max_position_embeddings
    if needs_text and sequence_length > longest:
        raise ValidationError(
            f"sequence_length={sequence_length} is more than the {longest} tokens that the model sees: set it to at "
            f"most {longest}."
        )
    forms = _forms(scheme, layers)
    # Ctrl-C is not lost, as it is where JAX calls back
    with StartInterrupt(), appearing(Path(output)) as folder:
        writer = ShardWriter(folder, _written_bytes(layers, forms))
        tokenizer = _tokenizer(checkpoint, needed=needs_text)
        samples = None
        if needs_text:
            path = None if calibration is None else Path(calibration)
            samples = read_samples(path, tokenizer, length=sequence_length, count=num_samples or NUM_SAMPLES, seed=seed)
        ends = layers.read_ends()
        written = saved_model.hugging_face_config(checkpoint.config, config, ends)
        errors, measured = _write_layers(layers, forms, samples, ends, writer, measures=perplexity, progress=progress)
        writer.close()
        written["quantization_config"] = forms.config
        files = {}
        if checkpoint.generation_config:
            files["generation_config.json"] = json.dumps(checkpoint.generation_config, indent=2).encode()
        saved_model.write_files(folder, written, files, tokenizer)
    before, after, tokens = measured or (None, None, 0)
    return QuantizationReport(
        output=Path(output),
        method=method,
        errors=tuple(errors),
        of_products=samples is not None,
        bytes_before=device_bytes(layers.specs, layers.dtype, {}),
        bytes_after=writer.total,
        perplexity_before=before,
        perplexity_after=after,
        perplexity_tokens=tokens,
    )


def _write_layers(
    layers: ModelLayers,
    forms: MatrixForms,
    samples: Samples | None,
    ends: Params,
    writer: ShardWriter,
    *,
    measures: bool,
    progress: bool,
) -> tuple[list[MatrixError], tuple[float, float, int] | None]:
    """Quantize and write all layers and what is outside. Returns the errors, and perplexity before, after, and tokens.

    Calibration sees of each layer the inputs that quantized layers before it make.
    """
    calibrates = forms.scheme.method in CALIBRATED
    watched = samples.calibration if samples and calibrates else samples.held_out if samples else []
    held = samples.held_out if samples and measures else []
    hidden, plain, after = (layers.begin(ends, each) for each in (watched, held, held))
    writer.add({tensor.name: tensor.value() for tensor in layers.end_tensors(ends)})
    errors: list[MatrixError] = []
    bar = tqdm(total=layers.config.num_layers, desc=f"Quantizing ({forms.scheme.method})", disable=not progress)
    with bar:
        for number in range(layers.config.num_layers):
            weights = layers.read(number)
            inputs = layers.observe(number, weights, hidden)
            done = quantize_layer(layers, forms, number, weights, inputs)
            del inputs
            writer.add(done.tensors)
            errors += done.errors
            if number + 1 < layers.config.num_layers:
                hidden = layers.run(number, done.weights, hidden)
            plain, after = layers.run(number, weights, plain), layers.run(number, done.weights, after)
            bar.update()
    if not held:
        return errors, None
    wide = layers.head(ends)
    found = [
        math.fsum(float(layers.score(wide, x, tokens).sum()) for x, tokens in zip(stream, held, strict=True))
        for stream in (plain, after)
    ]
    count = sum(len(tokens) - 1 for tokens in held)
    return errors, (math.exp(-found[0] / count), math.exp(-found[1] / count), count)


def _readable(checkpoint: Checkpoint) -> DecoderConfig:
    """The model of a checkpoint that can be quantized; else ValidationError."""
    if is_encoder(checkpoint.config):
        raise ValidationError("quantize takes models that generate, and this one can only be pooled.")
    if checkpoint.load_format == "orbax":
        raise ValidationError(
            f"{checkpoint.path} holds orbax arrays: save it with llm.save(directory, format='safetensors') first."
        )
    config = model_config(checkpoint.config)
    if config.vision is not None and not config.rope_sections:
        logger.warning("The model sees images, too: what is written is its text alone, a model of its own.")
        config = dataclasses.replace(config, vision=None, sees_whole_pictures=False)
    if config.vision is not None:
        raise ValidationError(
            "quantize takes models of texts, and this one sees images: its tower would be lost. Take a checkpoint that "
            "is quantized already, or quantize while loading: LLM(model, quantization='fp8')."
        )
    if config.moe is not None and (config.names.moe.stacked or config.names.moe.joined):
        remedy = (
            "take its MXFP4 checkpoint" if config.names.moe.stacked else "quantize while loading, quantization='fp8'"
        )
        raise ValidationError(
            f"The experts of this model are stacked tensors, which these formats do not have: {remedy}."
        )
    specs = decoder_specs(config)
    checkpoint.quantize(None, matrices(specs), prefix=config.names.prefix)
    if checkpoint.quantization is not None:
        raise ValidationError(
            f"The checkpoint is quantized already, by {checkpoint.quantization.method.name!r}: quantize the one in 16 "
            "bits that it was made from."
        )
    return config


def _dtype(asked: str, checkpoint: Checkpoint) -> str:
    stored = checkpoint.dtype.removeprefix("torch.")
    return asked if asked != "auto" else stored if stored in DTYPES else DTYPES[0]


def _forms(scheme: Scheme, layers: ModelLayers) -> MatrixForms:
    shapes: dict[str, tuple[int, int]] = {}
    others: list[str] = []
    for path, spec in jax.tree.leaves_with_path(layers.specs.layers, is_leaf=is_spec):
        name, own = str(path[-1].name), path[1:]
        for tensor, part in spec.tensors():
            if is_matrix(own):
                shapes[tensor.removesuffix(".weight")] = part.tensor_shape[:2]  # pyright: ignore[reportArgumentType]
            elif name in SMALL_FIELDS or ".kv_b_proj." in tensor:
                others.append(tensor.removesuffix(".weight"))
    return MatrixForms(scheme, shapes, dict.fromkeys(others), head=layers.config.names.head)


def _written_bytes(layers: ModelLayers, forms: MatrixForms) -> int:
    specs = quantized(layers.specs, lambda name: forms.layouts.get(name.removesuffix(".weight")))
    return device_bytes(specs, layers.dtype, {})


def _tokenizer(checkpoint: Checkpoint, *, needed: bool) -> Any:
    try:
        return load_tokenizer(checkpoint.path)
    except WeightsError:
        if needed:
            raise
        return None

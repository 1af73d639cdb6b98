"""A model as it is saved: a directory that `LLM` loads, and that transformers and vLLM load, too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.models import gemma3, llava
from jaxllm.models.model import ModelConfig, base_prefix
from jaxllm.models.params import Params
from jaxllm.models.pooler import Head
from jaxllm.models.registry import CLASSIFIER_SUFFIX
from jaxllm.weights.formats import hugging_face, orbax
from jaxllm.weights.naming import among_parts
from jaxllm.weights.new_folder import appearing
from jaxllm.weights.quantization.detect import Quantization
from jaxllm.weights.quantization.kept import write_kept
from jaxllm.weights.quantization.saved import SavedQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAVED_FORMATS = ("safetensors", "orbax")
#: a model that sees images -> the config.json of its text by itself
_TEXTS = {
    "Gemma3ForConditionalGeneration": gemma3.text_alone,
    "LlavaForConditionalGeneration": llava.text_alone,
    "LlavaNextForConditionalGeneration": llava.text_alone,
}
_GENERATING = ("ForCausalLM", "LMHeadModel")
_SUFFIXES = (*_GENERATING, "ForMaskedLM", CLASSIFIER_SUFFIX, "Model")


def save(
    directory: Path,
    params: Any,
    *,
    format: str,
    model: ModelConfig,
    specs: Any,
    quantization: Quantization | None,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Make `directory`, all of it or nothing.

    Args:
        params: the model's arrays.
        format: "safetensors" or "orbax".
        specs: what each of them is, a tree of `WeightSpec`s of the same form.
        quantization: of its matrices.
        config: the config.json that the model was made from.
        files: what else belongs to the model, by its path in the directory.

    Raises:
        ValidationError: an unknown format, or one that cannot hold how the weights are quantized.
        WeightsError: something is in `directory` already, there is no room for it, or it cannot be written.
    """
    if format not in SAVED_FORMATS:
        raise ValidationError(f"format must be {' or '.join(map(repr, SAVED_FORMATS))}, got {format!r}.")
    saved = None if quantization is None or format == "orbax" else SavedQuantization(quantization, specs)
    with appearing(directory) as folder:
        if format == "orbax":
            orbax.save(folder, params, specs)
            if quantization is not None:
                write_kept(folder, quantization)
            written = dict(config)
        else:
            written = hugging_face_config(config, model, params)
            found = _with_dense_modules_apart(folder, list(hugging_face.tensors(specs, params)))
            # the bare model's tensors have no prefix
            architecture: str = written["architectures"][0]
            is_bare = architecture.endswith("Model") and not architecture.endswith(_GENERATING)
            prefix, has_parts = base_prefix(model) if is_bare else "", architecture in _TEXTS

            def name_of(name: str) -> str:
                return among_parts(name) if has_parts else name.removeprefix(prefix)

            if saved is None:
                hugging_face.write(folder, [dataclasses.replace(each, name=name_of(each.name)) for each in found])
            else:
                written = saved.config(written)
                saved.write(folder, found, name_of)
        write_files(folder, written, files, tokenizer)


def _with_dense_modules_apart(folder: Path, found: list[hugging_face.Tensor]) -> list[hugging_face.Tensor]:
    """The tensors of the model's own file; those of sentence-transformers' modules are written into their folders."""
    modules: dict[str, list[hugging_face.Tensor]] = {}
    for tensor in found:
        path, _, name = tensor.name.rpartition("/")
        modules.setdefault(path, []).append(dataclasses.replace(tensor, name=name))
    for path in modules.keys() - {""}:
        (folder / path).mkdir(parents=True, exist_ok=True)
        hugging_face.write(folder / path, modules[path])
    return modules[""]


def write_files(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, bytes], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """What a model's directory has beside its weights; `files` by their paths in it."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def hugging_face_config(config: Mapping[str, Any], model: ModelConfig, params: Any) -> dict[str, Any]:
    """The config.json of what is saved: its class is the one that has these weights, no more and no fewer."""
    body = getattr(params, "body", params)
    sees, has_axes = isinstance(body, Params) and body.vision is not None, getattr(model, "rope_sections", ())
    if has_axes and not sees:
        raise ValidationError(
            "The engine runs without the tower that sees images, and what it saved would have none. Start it without "
            "limit_mm_per_prompt to save the model."
        )
    architecture = config["architectures"][0]
    written = dict(config if sees or architecture not in _TEXTS else _TEXTS[architecture](config))
    architecture = written["architectures"][0]
    # of a model that sees there is one class, which pooling leaves without a head
    if not isinstance(params, Params) and not sees:
        family = next(architecture.removesuffix(end) for end in _SUFFIXES if architecture.endswith(end))
        if isinstance(params.head, Head):
            architecture = f"{family}{CLASSIFIER_SUFFIX}"
        elif not (architecture.endswith(_GENERATING) and getattr(model, "tie_word_embeddings", False)):
            architecture = f"{family}Model"
    written.pop("torch_dtype", None)
    return {**written, "architectures": [architecture], "dtype": str(jax.tree.leaves(params)[0].dtype)}

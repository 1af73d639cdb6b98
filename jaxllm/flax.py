"""A loaded model as a module of `flax.nnx`, and back: trained in the process that generates with it.

    model = to_nnx(llm)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-5), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, tokens):
        loss, gradients = nnx.value_and_grad(lambda model: -model.token_logprobs(tokens).mean())(model)
        optimizer.update(model, gradients)
        return loss

    train(model, optimizer, tokens)
    llm.update_weights(nnx.state(model))

With `lora_rank`, adapters (LoRA) are trained, and the weights are not:

    model = to_nnx(llm, lora_rank=16, target_modules=("q_proj", "v_proj"))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.LoRAParam)
    loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, tokens)
    ...
    model.save_adapter("adapter")
    llm.generate(prompt, lora_request=LoRARequest("mine", 1, "adapter"))

The forward pass is the engine's own layers over attention without pages (`models.whole_sequences`), so that what is
trained is what generates. The weights in `update_weights` become the engine's without a copy where their dtype is the
engine's: a training step must not donate them, and their arrays live as long as either side uses them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.flax_adapters import TrainableAdapters
from jaxllm.models import whole_sequences
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params
from jaxllm.models.segments import resegment, segment_sizes
from pallas_kernels.quantized import is_quantized

if TYPE_CHECKING:
    from jaxllm.llm import LLM


class Model(nnx.Module):
    """A generating model over whole sequences. Every weight is an `nnx.Param`, under the name that it has in
    `models.params.Params`: ``model.weights.layers[0].qkv``.
    """

    def __init__(self, config: DecoderConfig, params: Params, adapters: TrainableAdapters | None = None):
        self.config = config
        self.weights = _nodes(params)
        self._structure = jax.tree.structure(params)
        if adapters is not None:
            #: an `nnx.LoRAParam` each: ``model.adapters.layers[0]["q_proj"].a``
            self.adapters = adapters

    @property
    def params(self) -> Params:
        """The weights as the model's functions take them."""
        return _as_params(self, self._structure)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Scores over the vocabulary, float32 [B, L, V], of tokens i32 [B, L] (see `whole_sequences.logits`)."""
        return whole_sequences.logits(self.config, self._adapted(tokens.size), tokens)

    def token_logprobs(self, tokens: jax.Array) -> jax.Array:
        """float32 [B, L - 1] of tokens i32 [B, L] (see `whole_sequences.token_logprobs`)."""
        return whole_sequences.token_logprobs(self.config, self._adapted(tokens[:, :-1].size), tokens)

    def _adapted(self, num_tokens: int) -> Params:
        adapters: TrainableAdapters | None = getattr(self, "adapters", None)
        return self.params if adapters is None else adapters.beside(self.params, num_tokens)

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapters in PEFT's format, as `LoRARequest` and PEFT read them: ``adapter_config.json`` and
        ``adapter_model.safetensors``. What the folder had of these is replaced.

        Raises:
            ValidationError: the model has none.
        """
        adapters: TrainableAdapters | None = getattr(self, "adapters", None)
        if adapters is None:
            raise ValidationError("save_adapter takes a model with adapters: to_nnx(llm, lora_rank=16).")
        adapters.save(Path(folder))


def to_nnx(
    llm: LLM,
    *,
    dtype: Any = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
) -> Model:
    """The model of an engine that generates, with a copy of its weights; or, with `lora_rank`, with its weights, or a
    copy where `dtype` is another one, and adapters to train beside them, which change nothing yet.

    Args:
        dtype: of the weights, in which the layers compute then; None: the engine's. Optimizers want float32, whose
            small steps bfloat16 rounds away; adapters are float32 in any case.
        lora_rank: of the adapters' matrices; None: there are no adapters, and the weights are trained.
        lora_alpha: the adapters' factor is `lora_alpha` / `lora_rank`; None: 1.
        target_modules: the modules that have adapters, by the ends of their names ("q_proj"); None: all that can.
        seed: of the adapters' random half.

    Raises:
        ValidationError: the engine pools, or its weights are split over devices or quantized; a rank below 1, or a
            module that the model has not.
        RuntimeError: it sleeps.
    """
    params, *_ = llm.apply_model(lambda params: params)
    if not isinstance(params, Params):
        raise ValidationError("to_nnx takes an engine that generates; this one pools (runner='pooling').")
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise ValidationError("to_nnx takes weights in 16 or 32 bits; this engine's are quantized.")
    if any(not array.is_fully_replicated for array in jax.tree.leaves(params)):
        raise ValidationError(
            "to_nnx takes an engine on one device: the rows of this one's weights are in the order of its "
            "devices (tensor_parallel_size). Train a copy with tensor_parallel_size=1, and llm.save() it for this one."
        )
    # those of pipeline stages come together
    home, copy = params.embedding.sharding, lora_rank is None
    copied = jax.tree.map(lambda array: jnp.array(jax.device_put(array, home), dtype=dtype, copy=copy), params)
    config = llm.engine.model_files.config
    assert isinstance(config.model, DecoderConfig)
    if lora_rank is None:
        others = {"lora_alpha": lora_alpha, "target_modules": target_modules}
        if given := [name for name, value in others.items() if value is not None]:
            raise ValidationError(f"{' and '.join(given)} need lora_rank, the rank of adapters: lora_rank=16.")
        return Model(config.model, copied)
    specs = resegment(config.unquantized_specs, segment_sizes(copied))
    adapters = TrainableAdapters(
        specs,
        rank=checks.integer("lora_rank", lora_rank),
        alpha=float(lora_rank if lora_alpha is None else lora_alpha),
        targets=None if target_modules is None else tuple(checks.strings("target_modules", target_modules)),
        base=str(llm.engine.args.model),
        seed=seed,
    )
    return Model(config.model, copied, adapters)


def is_nnx(value: object) -> bool:
    """Whether it is a `Model`, or a state of one."""
    return isinstance(value, (Model, nnx.State))


def to_params(value: Model | nnx.State, like: Any) -> Params:
    """The weights as an engine takes them, in its dtypes.

    Args:
        like: the engine's own.

    Raises:
        ValidationError: a weight is missing, or is there that the engine has none of; the text names it. Or it has
            adapters, which are no weights.
    """
    state = nnx.state(value) if isinstance(value, nnx.Module) else value
    if nnx.to_pure_dict(nnx.filter_state(state, nnx.LoRAParam)):
        raise ValidationError(
            "update_weights takes weights, and this model has adapters (lora_rank) beside the engine's own: "
            "model.save_adapter(folder), and LoRARequest(name, number, folder, load_inplace=True)."
        )
    params = _as_params(state, jax.tree.structure(like))
    return jax.tree.map(lambda new, old: new.astype(old.dtype), params, like)


def _nodes(tree: Any) -> Any:
    """Dataclasses become `nnx.Dict`s, tuples `nnx.List`s and arrays `nnx.Param`s; what is None is left out."""
    if dataclasses.is_dataclass(tree):
        found = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return nnx.Dict({name: _nodes(value) for name, value in found.items() if value is not None})
    return nnx.List([_nodes(value) for value in tree]) if isinstance(tree, tuple) else nnx.Param(tree)


def _as_params(value: Model | nnx.State, structure: Any) -> Params:
    """The `nnx.Param`s of a model or a state as a tree of this structure."""
    state = nnx.state(value, nnx.Param) if isinstance(value, nnx.Module) else nnx.filter_state(value, nnx.Param)
    pure = nnx.to_pure_dict(state)
    found = {path[1:]: array for path, array in _flat(pure.get("weights", {}), ("weights",))}
    numbers = structure.unflatten(range(structure.num_leaves))
    names = {_path(path): number for path, number in jax.tree.leaves_with_path(numbers)}
    if different := names.keys() ^ found.keys():
        name = ".".join(map(str, min(different, key=str)))
        problem = "is missing" if min(different, key=str) in names else "is no weight of this engine's model"
        raise ValidationError(f"weights.{name} {problem}: pass a state of what to_nnx gave, as it was.")
    return structure.unflatten([found[path] for path in names])


def _flat(node: Any, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Any]]:
    if not isinstance(node, dict):
        return [(path, node)]
    return [pair for name, child in node.items() for pair in _flat(child, (*path, name))]


def _path(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.name for key in path)

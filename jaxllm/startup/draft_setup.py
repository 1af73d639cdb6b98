"""Who drafts, from the arguments and, where a model does, from its files."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.config.cache import kv_cache_groups
from jaxllm.config.engine_args import EngineArgs
from jaxllm.config.speculative import OWN_DRAFT_QUANTIZATION, SpeculativeConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.draft_head import DraftHead, head_specs
from jaxllm.models.eagle import draft_method, eagle_head
from jaxllm.models.matrices import matrices
from jaxllm.models.model import ModelConfig, base_prefix
from jaxllm.models.mtp import mtp_head
from jaxllm.models.registry import model_config
from jaxllm.runner.runner_config import model_specs
from jaxllm.speculative.draft_model import ModelDrafter, draft_groups
from jaxllm.speculative.drafter import Drafter
from jaxllm.speculative.head_drafter import HeadDrafter
from jaxllm.speculative.ngram import NgramDrafter
from jaxllm.speculative.suffix import SuffixDrafter
from jaxllm.startup.tokenizer_files import read_tokenizer
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.resolve import resolve

logger = logging.getLogger("jaxllm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSetup:
    """A model that drafts for another one, or layers behind it that do."""

    checkpoint: Checkpoint
    model: DecoderConfig
    #: None: it is a model
    head: DraftHead | None = None
    #: whether it takes what pictures became: it is the model's own text part
    sees: bool = False


def make_drafter(
    config: SpeculativeConfig | None, target: ModelConfig, draft: DraftSetup | None, max_model_len: int
) -> Drafter | None:
    """Who drafts for the model `target`; None: nobody does.

    Args:
        draft: the model that does; None: drafts are found in texts.
        max_model_len: of the engine.
    """
    if config is None:
        return None
    drafts = config.num_speculative_tokens
    assert drafts is not None
    if draft is None:
        return _finds_drafts(config, drafts)
    model, groups = draft_groups(kv_cache_groups(target.kv_specs), draft.model)
    longest = min(config.max_model_len or model.max_position_embeddings, max_model_len)
    # masks of tokens are as long as the large model's vocabulary
    samples = config.draft_sample_method != "greedy" and model.vocab_size == target.vocab_size
    fields: dict[str, Any] = dict(num_drafts=drafts, model=model, groups=groups, max_length=longest, samples=samples)
    if draft.head is None:
        return ModelDrafter(**fields, sees=draft.sees)
    return HeadDrafter(**fields, head=draft.head)


def _finds_drafts(config: SpeculativeConfig, drafts: int) -> Drafter:
    """Who finds drafts in texts that there are."""
    if config.method == "suffix":
        depth, most = config.suffix_decoding_max_tree_depth, config.suffix_decoding_max_cached_requests
        factor, least = config.suffix_decoding_max_spec_factor, config.suffix_decoding_min_token_prob
        assert depth is not None and most is not None and factor is not None and least is not None
        return SuffixDrafter(drafts, depth, factor, least, most)
    low, high = config.prompt_lookup_min, config.prompt_lookup_max
    assert low is not None and high is not None
    return NgramDrafter(drafts, low, high)


def read_draft(
    args: EngineArgs, config: SpeculativeConfig, target: DecoderConfig, *, max_model_len: int | None
) -> DraftSetup:
    """The model that drafts for `target`; where none is named, the engine's own in fewer bits.

    Args:
        max_model_len: of the engine, where it is said.

    Raises:
        ValidationError: it does not fit the engine's model.
        WeightsError: its config cannot be read.
    """
    name, method = config.model or args.model, config.method
    # its own layers and weights are those of its own revision
    revision = args.revision if config.model is None and config.revision is None else config.revision
    path = resolve(name, revision=revision, token=args.hf_token)
    load_format = args.load_format if args.load_format in ("dummy", "null") else "auto"
    # its own layers are read as the model is
    own: dict[str, Any] = {"overrides": args.hf_overrides, "config_format": args.config_format}
    checkpoint = Checkpoint(path, load_format, **(own if config.model is None else {}))
    if config.is_guess:
        method = draft_method(checkpoint.config, method or "")
        logger.info("speculative_config names no method: %s is taken for method=%r. Name another if not.", name, method)
    if method != "draft_model":
        return _read_head(args, config, method, checkpoint, target, max_model_len)
    quantization = config.quantization
    if config.model is None:
        quantization = quantization or OWN_DRAFT_QUANTIZATION
        logger.info("No model is named that drafts: the engine's own does, in quantization=%r", quantization)
    try:
        model = model_config(checkpoint.config, max_model_len)
    except ValidationError as error:
        raise ValidationError(f"speculative_config.model={name!r}: {error}") from None
    # its tower is the engine's, or not asked
    model = dataclasses.replace(model, vision=None, sees_whole_pictures=False)
    if model.vocab_size != target.vocab_size:
        _check_vocabulary(args, path, model.vocab_size, target.vocab_size)
    kv_cache_groups(model.kv_specs)  # raises where layers keep different things
    checkpoint.quantize(quantization, matrices(model_specs(model, None)), prefix=base_prefix(model))
    return DraftSetup(checkpoint=checkpoint, model=model, sees=config.model is None)


def _read_head(
    args: EngineArgs,
    config: SpeculativeConfig,
    method: str | None,
    checkpoint: Checkpoint,
    target: DecoderConfig,
    max_model_len: int | None,
) -> DraftSetup:
    """The layers that draft for `target`: of files of their own, or those of the model's.

    Raises:
        ValidationError: they do not fit the engine's model.
    """
    if method == "mtp":
        prefix, quantization = target.names.prefix, config.quantization or args.quantization
        head, model = mtp_head(checkpoint.config, target, lambda name: checkpoint.has(name, prefix=prefix))
    else:
        quantization, kind = config.quantization, "eagle" if method == "eagle" else "eagle3"
        try:
            head, model = eagle_head(
                kind, checkpoint.config, target, lambda name: checkpoint.has(name, prefix=""), max_model_len
            )
        except ValidationError as error:
            raise ValidationError(f"speculative_config.model={config.model!r}: {error}") from None
    checkpoint.quantize(quantization, matrices(head_specs(head, model)), prefix=base_prefix(model))
    return DraftSetup(checkpoint=checkpoint, model=model, head=head)


def _check_vocabulary(args: EngineArgs, draft: Path, size: int, wanted: int) -> None:
    """Models of one family have the same tokens and tables of different heights.

    Raises:
        ValidationError: the tokens are others, or are not known.
    """
    problem = f"{draft}, which drafts, has a vocabulary of {size} tokens, and the model has {wanted}"
    remedy = "Take a smaller model of the same family, or method='ngram', which needs none."
    if args.skip_tokenizer_init:
        raise ValidationError(f"{problem}: whether they are the same, tokenizers would say. {remedy}")
    if read_tokenizer(args).get_vocab() != load_tokenizer(draft).get_vocab():
        raise ValidationError(f"{problem}, with other tokens. {remedy}")

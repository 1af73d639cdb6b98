"""Where an engine's tokenizer is, as its arguments say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.config.cache_folder import cache_folder
from jaxllm.config.engine_args import EngineArgs
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.resolve import resolve_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_path(args: EngineArgs, model: Path | None = None) -> Path:
    """The tokenizer's directory or .gguf file. Raises what `resolve` does.

    Args:
        model: the model's; None: it is looked for.
    """
    if args.tokenizer is not None or args.tokenizer_revision is not None:
        return resolve_tokenizer(args.tokenizer or args.model, revision=args.tokenizer_revision, token=args.hf_token)
    return resolve_tokenizer(args.model, revision=args.revision, token=args.hf_token) if model is None else model


def kept_tokenizers() -> Path:
    """The folder of those that transformers made (`tokenization.kept`)."""
    return cache_folder() / "tokenizers"


def read_tokenizer(args: EngineArgs, model: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer itself; the arguments are those of `tokenizer_path`. Raises WeightsError, too, for one that cannot
    be loaded.
    """
    return load_tokenizer(tokenizer_path(args, model), args.tokenizer_mode)

"""The tokenizer that datasets are made with."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jaxllm.command_options import engine_arguments
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.resolve import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def bench_tokenizer(arguments: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The model's, or that of ``--tokenizer``."""
    model, given = engine_arguments(arguments)
    return load_tokenizer(
        resolve(
            given.get("tokenizer") or model,
            revision=given.get("tokenizer_revision") or given.get("revision"),
            token=given.get("hf_token"),
        )
    )

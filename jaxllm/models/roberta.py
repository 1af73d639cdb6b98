"""RoBERTa and XLM-RoBERTa: BERT whose positions begin behind the padding token's row, and whose classification head has
a dense layer of its own (Liu et al. 2019, arXiv:1907.11692; Conneau et al. 2020, arXiv:1911.02116).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.models import bert
from jaxllm.models.bert import BertConfig
from jaxllm.models.names import ClassifierNames


def config_from_hf(hf: Mapping[str, Any]) -> BertConfig:
    """The model of a config.json, whose `max_position_embeddings` counts the rows that no token gets, too.

    Raises:
        KeyError, ValidationError: as `bert.config_from_hf`.
    """
    padding = hf.get("pad_token_id")
    first = (1 if padding is None else padding) + 1
    config = bert.config_from_hf(hf)
    longest = config.max_position_embeddings - first
    if longest < 1:
        raise ValidationError(
            f"max_position_embeddings={config.max_position_embeddings} of config.json leaves no position: the first "
            f"{first} are not used, since pad_token_id={first - 1}."
        )
    return dataclasses.replace(
        config,
        max_position_embeddings=longest,
        first_position=first,
        prefix="roberta.",
        classifier=ClassifierNames(dense="classifier.dense", classifier="classifier.out_proj"),
    )

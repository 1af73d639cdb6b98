"""Whoever drafts, and whatever kind of model it is: tokens are those of plain greedy decoding in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.draft_families import DRAFTERS, FAMILIES, drafts_of, mixed_requests, write_family
from support.drafts import checks_that_cost, counted, results

from jaxllm import LLM

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "skip_tokenizer_init": True,
}
#: what `make test` runs; the others take as long each
QUICK = {"Gemma2": "draft_model", "Mixtral": "eagle", "GptOss": "ngram", "DeepseekV3": "mtp"}
PAIRS = [(family, drafter) for family in FAMILIES for drafter in DRAFTERS] + [("DeepseekV3", "mtp")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Any]]]:
    """A family's model, and what it answers without drafts: asked once."""
    found: dict[str, tuple[Path, list[Any]]] = {}

    def answers(family: str) -> tuple[Path, list[Any]]:
        if family not in found:
            model = write_family(tmp_path_factory.mktemp(family), family)
            with LLM(model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as llm:
                found[family] = model, results(llm.generate(*mixed_requests(), use_tqdm=False))
        return found[family]

    return answers


@pytest.mark.parametrize(
    ("family", "drafter"),
    [pytest.param(*pair, marks=[] if QUICK.get(pair[0]) == pair[1] else pytest.mark.thorough) for pair in PAIRS],
)
def test_tokens_are_those_without_drafts(
    plain: Callable[[str], tuple[Path, list[Any]]], tmp_path: Path, tiny_model: Path, family: str, drafter: str
):
    """200 mixed requests, with a pool that does not hold two long ones."""
    model, wanted = plain(family)
    config = drafts_of(drafter, tmp_path, tiny_model)
    with (
        LLM(model, **ARGUMENTS, num_gpu_blocks_override=26, speculative_config=config) as llm,
        # whatever is drafted is checked
        checks_that_cost(llm, 0.0),
    ):
        assert results(llm.generate(*mixed_requests(), use_tqdm=False)) == wanted
        assert counted(llm, "num_accepted_tokens") > 60
        assert llm.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0
        values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        assert values["vllm:num_preemptions"]

"""CPU kernels multiply by the matrices and the experts of a model: on several devices, and after `update_weights`.

The oracle is the same engine without these kernels, whose products XLA computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.own_process import found_by


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("support.kernels_of_experts", tmp_path_factory.mktemp("experts"))


def test_the_kernels_are_there(found: dict[str, Any]):
    assert found["has kernels"] and not found["XLA's kernels"]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("kernels", "XLA"),
        ("own weights", "XLA"),
        # of which each device has some (enable_expert_parallel)
        ("whole experts", "XLA"),
        ("other weights", "other weights by XLA"),
    ],
)
def test_answers_are_those_of_xla(found: dict[str, Any], name: str, reference: str):
    for (ids, logprobs), (expected, values) in zip(found[name], found[reference], strict=True):
        assert ids == expected
        np.testing.assert_allclose(logprobs, values, atol=1e-3)


def test_other_weights_answer_otherwise(found: dict[str, Any]):
    assert found["other weights"] != found["kernels"]

"""Where the kernels run: compiled on a GPU where JAX has one, in Pallas' interpreter elsewhere."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope="session")
def interpret() -> bool:
    return jax.default_backend() != "gpu"

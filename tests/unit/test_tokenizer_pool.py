"""In which threads prompts are read."""

from __future__ import annotations

import threading

import pytest

from jaxllm.tokenization.pool import TokenizerPool


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_slow_is_done_beside_the_caller(workers: int):
    """A server's event loop calls, also where texts are tokenized by the caller."""
    pool, here = TokenizerPool(workers), threading.get_ident()
    assert pool.submit(threading.get_ident, slow=True).result() != here
    assert (pool.submit(threading.get_ident).result() == here) == (workers == 0)
    pool.shutdown()
    for slow in (True, False):
        with pytest.raises(RuntimeError, match="shut down"):
            pool.submit(threading.get_ident, slow=slow).result()

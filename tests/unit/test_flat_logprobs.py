"""The flat container reads as the list of dictionaries that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.api.logprobs import FlatLogprobs, Logprob

LOGPROBS = st.builds(Logprob, st.floats(-100, 0), st.none() | st.integers(1, 300_000), st.none() | st.text(max_size=3))
POSITIONS = st.lists(st.dictionaries(st.integers(0, 2**31 - 1), LOGPROBS, max_size=4), max_size=8)
INDICES = st.none() | st.integers(-10, 10)


@given(POSITIONS, INDICES, INDICES, INDICES.filter(lambda step: step != 0))
def test_it_is_the_list(positions, start, stop, step):
    flat = FlatLogprobs()
    flat.extend(positions)
    assert len(flat) == len(positions) and list(flat) == positions and flat == positions
    assert [list(position) for position in flat] == [list(position) for position in positions], "the order, too"
    part = flat[start:stop:step]
    assert isinstance(part, FlatLogprobs) and part == positions[start:stop:step]
    for index in range(-len(positions), len(positions)):
        assert flat[index] == positions[index]
    for index in (len(positions), -len(positions) - 1):
        with pytest.raises(IndexError):
            flat[index]
    part.append({1: Logprob(-1.0)})
    assert flat == positions, "a slice is a copy"


def test_the_first_entry_of_a_token_counts():
    flat = FlatLogprobs()
    flat.append(None)
    flat.append_entries([5, 6, 5], [-0.5, -1.0, -0.5], [2, 1, 3], ["a", "b", "a"])
    assert flat[0] == {} and flat != [{}, {}]
    assert flat[1] == {5: Logprob(-0.5, 2, "a"), 6: Logprob(-1.0, 1, "b")}
    assert list(flat.start_indices) == [0, 0] and list(flat.end_indices) == [0, 3]
    assert np.asarray(flat.logprobs).tolist() == [-0.5, -1.0, -0.5]
    assert np.asarray(flat.token_ids).dtype == np.int32
    assert repr(flat) == "FlatLogprobs(2 positions, 3 entries)"


def test_it_only_grows():
    flat = FlatLogprobs()
    flat.append({1: Logprob(-1.0)})
    for change in (lambda: flat.insert(0, {}), lambda: flat.__setitem__(0, {}), lambda: flat.__delitem__(0)):
        with pytest.raises(TypeError, match="can only be appended to"):
            change()
    with pytest.raises(TypeError):
        hash(flat)

"""Times of operations shared out to what they are for, by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.bench.op_times import BETWEEN, OTHER, ProgramText, Run, launch
from jaxllm.bench.op_times import _Operation as Operation
from jaxllm.layers.norm import rms_norm

TEXT = """HloModule jit_forward_step, is_scheduled=true

FileNames
1 "/somewhere/jaxllm/models/segments.py"
2 "/somewhere/jaxllm/layers/linear.py"
3 "/somewhere/pallas_kernels/fixed_order.py"
4 "/somewhere/pallas_kernels/paged_attention/xla.py"

FunctionNames
1 "through_layers"

FileLocations
1 {file_name_id=1 function_name_id=1 line=34 end_line=34 column=15 end_column=103}
2 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
3 {file_name_id=3 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
4 {file_name_id=4 function_name_id=1 line=1 end_line=1 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=4 parent_frame_id=1}
4 {file_location_id=3 parent_frame_id=3}

%fused_copy (p.1: bf16[2,4]) -> bf16[4] {
  %p.1 = bf16[2,4]{1,0} parameter(0)
  %slice.1 = bf16[1,4]{1,0} dynamic-slice(%p.1), metadata={op_name="while/body/dynamic_slice" stack_frame_id=1}
  ROOT %bitcast.1 = bf16[4]{0} bitcast(%slice.1)
}

%pieces (state.1: (f32[4])) -> (f32[4]) {
  %a.1 = f32[4]{0} add(%x, %y), metadata={op_name="a" stack_frame_id=3}
  %b.1 = f32[4]{0} add(%x, %y), metadata={op_name="b" stack_frame_id=4}
  ROOT %dot.1 = f32[4]{0} dot(%a.1, %b.1)
}

ENTRY %main (q.1: bf16[2,4]) -> f32[4] {
  %copied = bf16[4]{0} fusion(%q.1), kind=kLoop, calls=%fused_copy
  %product = f32[4]{0} custom-call(%copied), metadata={op_name="dot" stack_frame_id=2}
  %residual = f32[4]{0} add(%product, %product), metadata={op_name="while/body/closed_call" stack_frame_id=1}
  ROOT %while.1 = (f32[4]{0}) while(%residual), condition=%c, body=%pieces
}
"""


def test_instructions_belong_to_the_innermost_file_that_has_a_part():
    parts = ProgramText(TEXT).parts
    assert parts["product"] == "products with weights"
    # by way of a file that serves several
    assert parts["b.1"] == "attention"
    # what the loop over the layers calls is not the loop's
    assert parts["residual"] == OTHER
    assert parts["while.1"] is None


def test_instructions_without_a_source_belong_to_what_is_in_them_or_around_them():
    parts = ProgramText(TEXT).parts
    assert parts["copied"] == "a layer's weights copied"
    assert parts["dot.1"] == "attention"


def test_a_compiled_program_says_what_its_instructions_are_for():
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    weight = jax.ShapeDtypeStruct((256,), jnp.float32)
    text = jax.jit(lambda x, weight: rms_norm(x, weight, 1e-5)).lower(x, weight).compile().as_text()
    assert text is not None and set(ProgramText(text).parts.values()) >= {"norms"}


def shares(*operations: tuple[str, float, float, float]) -> dict[str, Any]:
    found = launch(Run([Operation(*operation) for operation in operations]), ProgramText(TEXT))
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    return {part: pytest.approx(1e9 * seconds) for part, seconds in found.parts.items() if seconds}


def test_one_after_the_other():
    assert shares(("copied", 100, 130, 130), ("product", 140, 200, 200)) == {
        "a layer's weights copied": 30,
        BETWEEN: 10,
        "products with weights": 60,
    }


def test_a_loop_has_the_time_of_what_is_in_it():
    assert shares(("while.1", 0, 50, 50), ("a.1", 5, 15, 15), ("product", 50, 60, 60)) == {
        BETWEEN: 40,
        "attention": 10,
        "products with weights": 10,
    }


def test_who_runs_beside_each_other_has_equal_shares():
    assert shares(("product", 0, 40, 40), ("a.1", 10, 30, 30)) == {"products with weights": 30, "attention": 10}


def test_what_other_threads_still_do_lasts_until_the_next_begins():
    told_late = ("product", 0, 20, 500)
    assert shares(told_late, ("a.1", 45, 60, 60)) == {"products with weights": 45, "attention": 15}
    told_early = ("product", 0, 20, 30)
    assert shares(told_early, ("a.1", 45, 60, 60)) == {"products with weights": 30, BETWEEN: 15, "attention": 15}

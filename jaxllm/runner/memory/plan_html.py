"""A memory plan as a notebook shows it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.runner.memory.plan import MemoryPlan

_WIDTH, _HEIGHT = 640, 28
_GIB = 2**30


def plan_html(plan: MemoryPlan) -> str:
    """A bar as wide as the device's memory, cut in proportion, and the parts by name."""
    parts = [
        ("weights", plan.weight_bytes, "#0072B2", ""),
        ("activations", plan.activation_bytes, "#E69F00", f"largest step: {plan.max_num_batched_tokens:,} tokens"),
        ("state", plan.state_bytes, "#CC79A7", f"token ids and constraints of {plan.num_rows:,} rows"),
        (
            "KV cache",
            plan.kv_cache_bytes,
            "#56B4E9",
            f"{plan.num_blocks:,} blocks of {plan.block_size} tokens, {plan.num_tokens:,} tokens in all, "
            f"{plan.max_concurrency:.2f} requests of {plan.max_model_len:,} at once",
        ),
    ]
    used = sum(size for _, size, _, _ in parts)
    parts.append(("not used", max(plan.total_bytes - used, 0), "#CCCCCC", ""))
    whole = max(plan.total_bytes, used, 1)
    bars, rows, left = [], [], 0.0
    for name, size, colour, note in parts:
        width = _WIDTH * size / whole
        label = f"{name}: {size / _GIB:.3f} GiB"
        bars.append(
            f'<rect x="{left:.2f}" y="0" width="{width:.2f}" height="{_HEIGHT}" fill="{colour}">'
            f"<title>{html.escape(label)}</title></rect>"
        )
        left += width
        rows.append(
            f'<tr><td style="text-align:left"><span style="color:{colour}">&#9632;</span> {html.escape(name)}</td>'
            f'<td style="text-align:right">{size / _GIB:.3f} GiB</td>'
            f'<td style="text-align:left">{html.escape(note)}</td></tr>'
        )
    if plan.num_host_layers:
        rows.append(
            '<tr><td style="text-align:left">host weights</td>'
            f'<td style="text-align:right">{plan.host_weight_bytes / _GIB:.3f} GiB</td>'
            f'<td style="text-align:left">{plan.num_host_layers:,} layers, in the machine\'s memory; each step copies '
            "them</td></tr>"
        )
    if plan.num_host_blocks:
        rows.append(
            '<tr><td style="text-align:left">host KV pool</td>'
            f'<td style="text-align:right">{plan.host_cache_bytes / _GIB:.3f} GiB</td>'
            f'<td style="text-align:left">{plan.num_host_blocks:,} blocks, in the machine\'s memory</td></tr>'
        )
    title = f"{plan.device}: {plan.total_bytes / _GIB:.2f} GiB, gpu_memory_utilization={plan.gpu_memory_utilization:g}"
    return (
        f"<div><div>{html.escape(title)}</div>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(bars)}</svg>'
        f"<table>{''.join(rows)}</table></div>"
    )

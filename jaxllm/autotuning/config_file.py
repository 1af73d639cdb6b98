"""The configuration that a search writes, for ``--config``: every value with its reason and its effect."""

from __future__ import annotations

import os
import textwrap
from typing import Any

from jaxllm.autotuning.result import TuningResult

_WIDTH = 118


def config_text(result: TuningResult) -> str:
    """YAML that `jaxllm.config.files.load_config` reads."""
    goals, best = result.goals, result.best
    how = "measured" if result.is_measured else "simulated"
    spread = f", the rounds within {best.spread(goals):.1%}" if len(best.measured) > 1 else ""
    lines = _comment(f"Found by `jaxllm tune` for {goals}, on {result.device}.")
    lines += _comment(f"Workload: {result.workload}.")
    if result.interrupted:
        lines += _comment("The search was interrupted: this is the best so far.")
    if not result.feasible:
        lines += _comment(result.verdict())
    rounds = f", medians of {len(best.measured)} rounds" if len(best.measured) > 1 else ""
    lines += _comment(f"With it, {how}{rounds}: {goals.text(best.numbers)}{spread}.")
    if result.base.numbers:
        base_how = "measured" if result.base.measured else "simulated"
        base = goals.text(result.base.numbers)
        compared = f"; {result.gain_text()}" if result.gain_text() else ""
        lines += _comment(f"With the engine's defaults, {base_how}: {base}{compared}.")
    lines += _comment(result.uncertainty)
    lines += ["", f"model: {_yaml(result.model)}", ""]
    for name, value in result.fixed.items():
        if value is not None:
            lines += [*_comment("You hold it fixed."), *_line(name, value), ""]
    known = {}
    for effect in result.effects:
        lines += _comment(f"Why: {effect.knob.why}.")
        lines += _comment(f"Effect: {effect.text(goals)}.")
        for name, value in effect.knob.arguments(effect.value).items():
            lines.append(f"{name}: {_yaml(value)}")
            known[name] = value
        lines.append("")
    for name, value in best.arguments.items():
        if name not in known:
            lines += [*_comment(_unknown(name)), f"{name}: {_yaml(value)}", ""]
    others = [knob for knob in result.space.knobs if knob.name not in {effect.knob.name for effect in result.effects}]
    if others:
        lines += _comment("Searched, and best left at the default:")
        for knob in others:
            values = ", ".join(knob.shown(value) for value in knob.values)
            lines += _comment(f"  {knob.name} ({knob.shown(knob.default)}; of {values})")
    if result.space.left:
        lines += _comment("Not searched:")
        for name, why in result.space.left.items():
            lines += _comment(f"  {name}: {why}")
    return "\n".join(lines).rstrip() + "\n"


def _unknown(name: str) -> str:
    if name == "max_model_len":
        return "Why: the model's own length does not fit, and this one serves the workload."
    return "Why: it was measured beside the others, and was the fastest."


def _comment(text: str) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(
        text, _WIDTH, initial_indent="# ", subsequent_indent=f"# {indent}  " if indent else "# ", break_long_words=False
    )


def _line(name: str, value: Any) -> list[str]:
    """What cannot be written is said."""
    import yaml

    try:
        return [f"{name}: {_yaml(value)}"]
    except yaml.YAMLError:
        return _comment(f"{name}: {type(value).__name__} cannot be written in YAML; give it beside this file.")


def _yaml(value: Any) -> str:
    import yaml

    plain = str(value) if isinstance(value, os.PathLike) else list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("\n...").strip()

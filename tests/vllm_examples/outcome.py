"""What a run of an example shows."""

from __future__ import annotations

import re

#: what jaxllm refuses with: names that it does not have, and its own errors
_REFUSAL = re.compile(r"\w+Error: jaxllm has no |jaxllm\.api\.errors\.ValidationError: ")


def outcome(returncode: int | None, stderr: str) -> str:
    """ "ok", or "refused: ..." or "failed: ..." with the reason, the last line of the traceback.

    Args:
        returncode: None: it did not end in time.
    """
    if returncode is None:
        return "failed: it did not end in time"
    if returncode == 0:
        return "ok"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    reason = (errors or lines or [f"exit status {returncode}"])[-1]
    return f"{'refused' if _REFUSAL.match(reason) else 'failed'}: {reason[:160]}"


def renamed(script: str) -> str:
    """A script with the package's name changed in its imports, and nothing else."""
    return re.sub(r"^(\s*(?:from|import)\s+)vllm\b", r"\1jaxllm", script, flags=re.MULTILINE)

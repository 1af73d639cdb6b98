"""The error every weight reader raises."""

from __future__ import annotations

from jaxllm.api.errors import JaxLLMError


class WeightsError(JaxLLMError, ValueError):
    """A weight file that cannot be used: unreadable, truncated, corrupt, or not what the model expects.

    The message names the file, the tensor where there is one, what was seen and what would have been right.
    """

"""The tower at work: pictures into the cache of encoded items, ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxllm.models.vision import VisionParams
from jaxllm.multimodal.items import EncoderInput
from jaxllm.parallel.processes import put_whole
from jaxllm.runner.compile.programs import Programs


class Pictures:
    """Launches the programs that encode, where there are any.

    Args:
        programs: of a pipeline, the first stage's, which has the tower.
    """

    def __init__(self, programs: Programs):
        self._programs = programs
        #: of the tower; None: they are not on the device
        self.params: VisionParams | None = None

    def encode(self, encoded: jax.Array | None, inputs: Sequence[EncoderInput]) -> jax.Array:
        """The cache of encoded items [rows, d], which is donated, with those of a step."""
        encoder = self._programs.encoder
        assert encoder is not None and encoded is not None
        for given in inputs:
            size, pixels, words = encoder.pack(given)
            encoded = self._launch(encoded, size, pixels, words)
        return encoded

    def warm_up(self, encoded: jax.Array | None, *, smallest: bool) -> jax.Array | None:
        """Run every program on padding alone, or the smallest one. Returns the cache that lives on."""
        encoder = self._programs.encoder
        if encoder is None or encoded is None:
            return encoded
        for size in list(encoder.packings)[: 1 if smallest else None]:
            encoded = self._launch(encoded, size, *encoder.nothing(size))
        return encoded

    def _launch(self, encoded: jax.Array, size: int, pixels: object, words: object) -> jax.Array:
        given = (put_whole(array, self._programs.sharding) for array in (pixels, words))
        return self._programs.encode(size)(self.params, encoded, *given)

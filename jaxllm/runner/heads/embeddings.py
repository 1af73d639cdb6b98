"""Vectors of prompts on their way to the device: an argument of forward programs that most steps have no use for."""

from __future__ import annotations

import jax
import numpy as np

from jaxllm.parallel.processes import put_whole
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.compile.programs import Programs


class Embeddings:
    """Makes the argument of `Programs.embeddings`. Steps without vectors get zeros that are on the device already."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._zeros: dict[Bucket, jax.Array] = {}

    def argument(self, bucket: Bucket, vectors: np.ndarray | None) -> tuple[jax.Array, ...]:
        """What a bucket's forward program takes besides; () where the engine takes no such prompts.

        Args:
            vectors: `Rows.embeddings` of the step.
        """
        shapes = self._programs.embeddings(bucket)
        if not shapes:
            return ()
        if vectors is not None:
            return (put_whole(vectors, shapes[0].sharding),)
        if bucket not in self._zeros:
            (shape,) = shapes
            self._zeros[bucket] = put_whole(np.zeros(shape.shape, shape.dtype), shape.sharding)
        return (self._zeros[bucket],)

    def free(self) -> None:
        for array in self._zeros.values():
            array.delete()
        self._zeros.clear()

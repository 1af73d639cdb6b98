"""Embeddings, classes and scores against transformers on torch: all-MiniLM-L6-v2, and small random models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.quick_compile import THOROUGH

from jaxllm import LLM, LateChunkingParams, PoolingParams
from jaxllm.runner.compile.compiler_options import CPU_OPTIONS

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "block_size": 16, "enforce_eager": True}
SENTENCES = [
    "A cat sits on the mat.",
    "A feline rests on a rug.",
    "Stock markets fell sharply on Tuesday.",
    "hi",
    "naïve résumé 日本語 😀",
    " ".join(["a long text of several words, again and again"] * 20),
    "x",
]


@pytest.fixture(scope="module")
def engine(minilm: Path) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        # bits are compared
        for name, value in THOROUGH.items():
            patch.setitem(CPU_OPTIONS, name, value)
        llm = LLM("all-minilm-l6-v2", max_num_seqs=8, enforce_eager=True)
    with llm:
        yield llm


def embeddings(llm: LLM, prompts: Any, **kwargs: Any) -> np.ndarray:
    return np.array([o.outputs.embedding for o in llm.embed(prompts, use_tqdm=False, **kwargs)])


def reference(folder: Path, texts: list[str], max_length: int = 256) -> np.ndarray:
    """Mean of the last hidden states, normalised, as the model's card says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()


def test_minilm_embeddings(engine: LLM, minilm: Path) -> None:
    ours, theirs = embeddings(engine, SENTENCES), reference(minilm, SENTENCES)
    assert ours.shape == (len(SENTENCES), 384)
    assert np.abs(ours - theirs).max() < 1e-5


def test_minilm_is_the_same_alone_and_in_any_batch(engine: LLM) -> None:
    together = embeddings(engine, SENTENCES)
    alone = np.concatenate([embeddings(engine, text) for text in SENTENCES])
    np.testing.assert_array_equal(together, alone)


def test_minilm_truncates_as_transformers_does(engine: LLM, minilm: Path) -> None:
    text = " ".join(SENTENCES * 4)
    ours = embeddings(engine, text, tokenization_kwargs={"truncate_prompt_tokens": -1})
    assert np.abs(ours - reference(minilm, [text])).max() < 1e-5
    (output,) = engine.embed(text, use_tqdm=False, pooling_params=PoolingParams(truncate_prompt_tokens=12))
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    assert output.prompt_token_ids == tokenizer.encode(text, truncation=True, max_length=12)
    with pytest.raises(ValueError, match="longer than the maximum model length of 256"):
        engine.embed(text, use_tqdm=False)


def test_minilm_scores_similar_sentences_higher(engine: LLM) -> None:
    query, *others = SENTENCES[:3]
    similar, different = (o.outputs.score for o in engine.score(query, others, use_tqdm=False))
    assert similar > 0.5 > 0.2 > different
    vectors = embeddings(engine, SENTENCES[:3])
    np.testing.assert_allclose([similar, different], vectors[1:] @ vectors[0], atol=1e-6)


def test_minilm_tokens_and_raw_means(engine: LLM, minilm: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        hidden = model(**tokenizer(SENTENCES[0], return_tensors="pt")).last_hidden_state[0].numpy()
    raw = PoolingParams(use_activation=False)
    (tokens,) = engine.encode(SENTENCES[0], raw, pooling_task="token_embed", use_tqdm=False)
    (mean,) = engine.encode(SENTENCES[0], raw, pooling_task="embed", use_tqdm=False)
    np.testing.assert_allclose(tokens.outputs.data, hidden, atol=1e-5)
    np.testing.assert_allclose(mean.outputs.data, hidden.mean(0), atol=1e-5)


def test_minilm_late_chunks(engine: LLM, minilm: Path) -> None:
    """Means over the states of a whole text, special tokens included, and where in the text they are."""
    text = SENTENCES[4] + " " + SENTENCES[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    batch = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = batch.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state[0]
    params = PoolingParams(late_chunking_params=LateChunkingParams(5))
    (output,) = engine.encode(text, params, pooling_task="token_embed", use_tqdm=False)
    expected = torch.stack([torch.nn.functional.normalize(part.mean(0), dim=0) for part in hidden.split(5)])
    np.testing.assert_allclose(output.outputs.data, expected, atol=1e-5)
    assert output.late_chunking is not None
    for chunk in output.late_chunking.chunks:
        own = [offset for offset in offsets[slice(*chunk.token_range)] if offset[0] < offset[1]]
        assert chunk.char_range == ((own[0][0], own[-1][1]) if own else None)


# Decoders, small and random.

DECODER = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PROMPTS = [np.random.default_rng(n).integers(3, 300, size=n).tolist() for n in (1, 2, 31, 33, 64, 100, 199)]


def save(folder: Path, name: str, seed: int = 0, **fields: Any) -> Any:
    """A random model of transformers' class `name`, saved into `folder`; norms and biases are drawn too."""
    config = getattr(transformers, f"{name.split('For')[0].removesuffix('Model')}Config")(
        **{"pad_token_id": 0, **fields}
    )
    model = getattr(transformers, name)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            base = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + base)
    model.save_pretrained(folder)
    return model


def hidden_states(model: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    with torch.no_grad():
        return [model(torch.tensor([ids])).last_hidden_state[0].numpy() for ids in prompts]


def normalized(vectors: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(vectors)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["Qwen2Model", "LlamaModel", "Qwen3Model"])
def test_decoder_embeddings_of_the_last_token(name: str, tmp_path: Path) -> None:
    model = save(tmp_path, name, **DECODER)
    expected = normalized([hidden[-1] for hidden in hidden_states(model, PROMPTS)])
    # chunks of 32 tokens
    with LLM(tmp_path, **SMALL, max_num_batched_tokens=32, skip_tokenizer_init=True) as llm:
        ours = embeddings(llm, PROMPTS)
        assert np.abs(ours - expected).max() < 1e-5
        again = llm.embed(PROMPTS, use_tqdm=False)
        assert [o.num_cached_tokens for o in again] == [0, 0, 16, 32, 48, 96, 192]
        np.testing.assert_allclose([o.outputs.embedding for o in again], expected, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["MEAN", "CLS"])
def test_decoder_pooling_of_several_tokens_does_not_depend_on_chunks(kind: str, tmp_path: Path) -> None:
    model = save(tmp_path, "LlamaForCausalLM", **DECODER)
    states = hidden_states(model.model, PROMPTS)
    expected = normalized([hidden.mean(0) if kind == "MEAN" else hidden[0] for hidden in states])
    common = {**SMALL, "skip_tokenizer_init": True, "pooler_config": {"pooling_type": kind}, "convert": "embed"}
    found = []
    for tokens in (32, 512):
        with LLM(tmp_path, **common, max_num_batched_tokens=tokens) as llm:
            for _ in range(2):  # the second time there is a prefix cache to leave alone
                outputs = llm.embed(PROMPTS, use_tqdm=False)
                assert not any(o.num_cached_tokens for o in outputs)
                found.append(np.array([o.outputs.embedding for o in outputs]))
                assert np.abs(found[-1] - expected).max() < 1e-5
            raw = PoolingParams(use_activation=False)
            tokens_of = llm.encode(PROMPTS, raw, pooling_task="token_embed", use_tqdm=False)
            for output, hidden in zip(tokens_of, states, strict=True):
                np.testing.assert_allclose(output.outputs.data, hidden, atol=2e-5)


def test_classes_of_decoders(tmp_path: Path) -> None:
    model = save(tmp_path, "Qwen2ForSequenceClassification", num_labels=3, **DECODER)
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([ids])).logits[0] for ids in PROMPTS])
    with LLM(tmp_path, **SMALL, max_num_batched_tokens=32, skip_tokenizer_init=True) as llm:
        ours = [o.outputs.probs for o in llm.classify(PROMPTS, use_tqdm=False)]
        np.testing.assert_allclose(ours, logits.softmax(-1).numpy(), atol=1e-5)
        raw = llm.classify(PROMPTS, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        np.testing.assert_allclose([o.outputs.probs for o in raw], logits.numpy(), atol=1e-5)
        (tokens,) = llm.encode([PROMPTS[3]], pooling_task="token_classify", use_tqdm=False)
        with torch.no_grad():
            every = model.score(model.model(torch.tensor([PROMPTS[3]])).last_hidden_state)[0]
        np.testing.assert_allclose(tokens.outputs.data, every.softmax(-1).numpy(), atol=1e-5)
        with pytest.raises(ValueError, match="Embedding API is not supported by this model"):
            llm.embed(PROMPTS, use_tqdm=False)
        with pytest.raises(ValueError, match="num_labels == 1"):
            llm.score("a", "b", use_tqdm=False)


@pytest.mark.thorough
def test_bidirectional_decoders(tmp_path: Path) -> None:
    """A config with is_causal=false, against the same computation written out with transformers' own layers."""
    model = save(tmp_path, "LlamaModel", **DECODER)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    expected = []
    for ids in PROMPTS:
        everything = torch.zeros(1, 1, len(ids), len(ids))
        with torch.no_grad():
            expected.append(model(torch.tensor([ids]), attention_mask=everything).last_hidden_state[0].mean(0).numpy())
    with LLM(tmp_path, **SMALL, skip_tokenizer_init=True, pooler_config={"pooling_type": "MEAN"}) as llm:
        assert np.abs(embeddings(llm, PROMPTS) - normalized(expected)).max() < 1e-5


def test_embedding_gemma(tmp_path: Path) -> None:
    """Windows that reach both ways, and layers behind the mean, which lie in folders of their own."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    sizes = {**DECODER, "head_dim": 20, "query_pre_attn_scalar": 24}
    model = save(tmp_path, "Gemma3TextModel", use_bidirectional_attention=True, **sizes, **layers)
    kinds = {"0": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Dense": "Dense", "4": "Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    draw, matrices = np.random.default_rng(0), []
    for path, activation, (rows, columns) in (("2_Dense", "linear.Identity", (72, 48)), ("3_Dense", "Tanh", (40, 72))):
        matrices.append(draw.normal(size=(rows, columns)).astype(np.float32) / 8)
        (tmp_path / path).mkdir()
        save_file({"linear.weight": matrices[-1]}, tmp_path / path / "model.safetensors")
        config = {"in_features": columns, "out_features": rows, "bias": False, "activation_function": activation}
        (tmp_path / path / "config.json").write_text(json.dumps(config))
    means = np.stack([hidden.mean(0) for hidden in hidden_states(model, PROMPTS)])
    expected = normalized(list(np.tanh(means @ matrices[0].T @ matrices[1].T)))
    with LLM(tmp_path, **SMALL, skip_tokenizer_init=True) as llm:
        assert np.abs(embeddings(llm, PROMPTS) - expected).max() < 1e-5
        llm.save(tmp_path / "saved")
    for path, matrix in zip(("2_Dense", "3_Dense"), matrices, strict=True):
        saved = load_file(tmp_path / "saved" / path / "model.safetensors")
        np.testing.assert_array_equal(saved["linear.weight"], matrix)
    again = hidden_states(transformers.AutoModel.from_pretrained(tmp_path / "saved"), PROMPTS[3:4])[0].mean(0)
    np.testing.assert_allclose(again, means[3], atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", pytest.param("cls", marks=pytest.mark.thorough)])
def test_modernbert_embeds_and_classifies(pooling: str, tmp_path: Path) -> None:
    sizes = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
    fields = {**sizes, "num_hidden_layers": 4, "local_attention": 16, "classifier_pooling": pooling, "num_labels": 3}
    biases = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), pooling == "cls")
    model = save(tmp_path, "ModernBertForSequenceClassification", **fields, **biases)
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([ids])).logits[0] for ids in PROMPTS]).softmax(-1).numpy()
    with LLM(tmp_path, **SMALL, skip_tokenizer_init=True) as llm:
        ours = [o.outputs.probs for o in llm.classify(PROMPTS, use_tqdm=False)]
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        llm.save(tmp_path / "saved")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again[name]), name
    if pooling == "cls":
        expected = normalized([hidden[0] for hidden in hidden_states(model.model, PROMPTS)])
        with LLM(tmp_path, **SMALL, skip_tokenizer_init=True, convert="embed") as llm:
            assert np.abs(embeddings(llm, PROMPTS) - expected).max() < 1e-5


# BERT as a cross-encoder.

BERT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

#: as vLLM's for rerankers
RERANK_TEMPLATE = (
    "Q: {{ (messages | selectattr('role', 'eq', 'query') | first).content }} "
    "D: {{ (messages | selectattr('role', 'eq', 'document') | first).content }}"
)


@pytest.mark.thorough
@pytest.mark.parametrize("labels", [1, 3])
def test_bert_reads_pairs_with_token_types(labels: int, minilm: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(tmp_path)
    model = save(tmp_path, "BertForSequenceClassification", vocab_size=30522, num_labels=labels, **BERT)
    pairs = [("How many people live in Berlin?", text) for text in (*SENTENCES[:5], "word " * 100)]
    batch = tokenizer(pairs, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    with LLM(tmp_path, **SMALL) as llm:
        truncate = {"truncate_prompt_tokens": -1}
        if labels == 1:
            query, texts = pairs[0][0], [text for _, text in pairs]
            outputs = llm.score(query, texts, use_tqdm=False, tokenization_kwargs=truncate)
            np.testing.assert_allclose([o.outputs.score for o in outputs], logits.sigmoid()[:, 0].numpy(), atol=1e-5)
            assert outputs[-1].prompt_token_ids == batch["input_ids"][-1].tolist()
            written = tokenizer([f"Q: {query} D: {text}" for text in texts[:5]], padding=True, return_tensors="pt")
            with torch.no_grad():
                expected = model(**written).logits.sigmoid()[:, 0].numpy()
            outputs = llm.score(query, texts[:5], use_tqdm=False, chat_template=RERANK_TEMPLATE)
            np.testing.assert_allclose([o.outputs.score for o in outputs], expected, atol=1e-5)
        single = tokenizer(SENTENCES[:5], padding=True, return_tensors="pt")
        with torch.no_grad():
            scores = model(**single).logits
        expected = scores.sigmoid() if labels == 1 else scores.softmax(-1)
        ours = [o.outputs.probs for o in llm.classify(SENTENCES[:5], use_tqdm=False)]
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


def roberta_tokenizer(minilm: Path, folder: Path) -> Any:
    """MiniLM's words, and two separators between the texts of a pair, which have one token type."""
    backend = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]", special_tokens=ends
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        pad_token="[unused4]",
        model_input_names=["input_ids", "attention_mask"],
    )
    made.save_pretrained(folder)
    return made


@pytest.mark.thorough
def test_xlm_roberta_scores_pairs(minilm: Path, tmp_path: Path) -> None:
    """Positions begin behind that of padding, of which the longest prompt reaches the last."""
    tokenizer = roberta_tokenizer(minilm, tmp_path)
    fields = {**BERT, "vocab_size": 30522, "type_vocab_size": 1, "pad_token_id": 5, "num_labels": 1}
    model = save(tmp_path, "XLMRobertaForSequenceClassification", **fields)
    query, texts = "How many people live in Berlin?", [*SENTENCES[:5], "word " * 100]
    batch = tokenizer([(query, text) for text in texts], padding=True, truncation=True, max_length=58)
    batch = {name: torch.tensor(values) for name, values in batch.items()}
    single = tokenizer(SENTENCES[:5], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits.sigmoid()[:, 0].numpy()
        classes = model(**single).logits.sigmoid().numpy()
    with LLM(tmp_path, **SMALL) as llm:
        truncate = {"truncate_prompt_tokens": -1}
        outputs = llm.score(query, texts, use_tqdm=False, tokenization_kwargs=truncate)
        assert len(outputs[-1].prompt_token_ids) == 58
        np.testing.assert_allclose([o.outputs.score for o in outputs], expected, atol=1e-5)
        ours = [o.outputs.probs for o in llm.classify(SENTENCES[:5], use_tqdm=False)]
        np.testing.assert_allclose(ours, classes, atol=1e-5)
        with pytest.raises(ValueError, match="maximum model length of 58"):
            llm.classify("word " * 57, use_tqdm=False)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("XLMRobertaModel", "cls"),
        pytest.param("RobertaForMaskedLM", "mean", marks=pytest.mark.thorough),
    ],
)
def test_roberta_embeds_as_its_modules_say(name: str, mode: str, minilm: Path, tmp_path: Path) -> None:
    """bge-m3 takes the first token, multilingual-e5 the mean of all."""
    tokenizer = roberta_tokenizer(minilm, tmp_path)
    model = save(tmp_path, name, vocab_size=30522, type_vocab_size=2, **{**BERT, "pad_token_id": 1})
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in ("Pooling", "Normalize")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "Pooling").mkdir()
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    (tmp_path / "Pooling/config.json").write_text(json.dumps({modes[mode]: True}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40}))
    texts = [text for text in SENTENCES if len(text) < 100]
    states = hidden_states(getattr(model, "roberta", model), [tokenizer(text).input_ids for text in texts])
    expected = normalized([hidden[0] if mode == "cls" else hidden.mean(0) for hidden in states])
    with LLM(tmp_path, **SMALL) as llm:
        assert np.abs(embeddings(llm, texts) - expected).max() < 1e-5
        with pytest.raises(ValueError, match="maximum model length of 40"):
            llm.embed("word " * 41, use_tqdm=False)
        if name.endswith("Model"):
            llm.save(tmp_path / "saved")
    if name.endswith("Model"):
        again = transformers.AutoModel.from_pretrained(tmp_path / "saved")
        kept = dict(again.named_parameters())
        for at, weight in model.named_parameters():
            # no head of ours has it
            assert at.startswith("pooler.") or torch.equal(weight, kept[at]), at


@pytest.mark.thorough
@pytest.mark.parametrize("tied", [True, False])
def test_a_reranker_is_made_of_two_rows_of_a_generating_model(tied: bool, minilm: Path, tmp_path: Path) -> None:
    """Qwen3-Reranker as it was published: the score is how likely "yes" is beside "no"."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(tmp_path)
    sizes = {**DECODER, "vocab_size": 30522, "head_dim": 12}
    model = save(tmp_path, "Qwen3ForCausalLM", **sizes, tie_word_embeddings=tied)
    no, yes = tokenizer.convert_tokens_to_ids(["no", "yes"])
    query, *texts = SENTENCES[:5]
    expected = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(f"Q: {query} D: {text}", return_tensors="pt")).logits[0, -1]
        expected.append(float(logits[[no, yes]].softmax(0)[1]))
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    options = {"chat_template": RERANK_TEMPLATE, "use_tqdm": False}
    with LLM(tmp_path, **SMALL, runner="pooling", hf_overrides=overrides) as llm:
        scores = [o.outputs.score for o in llm.score(query, texts, **options)]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        if tied:
            llm.save(tmp_path / "saved")
    if tied:
        with LLM(tmp_path / "saved", **SMALL) as llm:
            assert [o.outputs.score for o in llm.score(query, texts, **options)] == scores


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"classifier_from_token": ["no", "yes"]}, "add 'method' to hf_overrides"),
        ({"classifier_from_token": ["yes"], "method": "from_2_way_softmax"}, "takes two tokens"),
        ({"classifier_from_token": ["nonesuch"], "method": "no_post_processing"}, "has no token 'nonesuch'"),
        ({"classifier_from_token": "yes"}, "must be a list of tokens"),
    ],
)
def test_a_head_that_cannot_be_made_is_refused(overrides: dict[str, Any], words: str, minilm: Path, tmp_path: Path):
    transformers.AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    save(tmp_path, "Qwen3ForCausalLM", **DECODER, head_dim=12)
    with pytest.raises(ValueError, match=words):
        LLM(tmp_path, **SMALL, hf_overrides={"architectures": ["Qwen3ForSequenceClassification"], **overrides})

"""Tasks on texts against transformers' pipelines on the same weights and tokenizers."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import inference
from tests.small_tokenizers import BERT_PURPOSES, ROBERTA_PURPOSES, bert, byte_level, roberta, save

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "the end of the function",
    "the fox, the dog: main! zebra over def",
    "over",
]
SIZES: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=66,
)
SIZES |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """(class, options of the config) -> a folder with a model of random weights and a tokenizer."""

    @functools.cache
    def make(name, options=()):
        torch.manual_seed(0)
        folder, options = tmp_path_factory.mktemp(name), dict(options)
        if name.startswith("Roberta"):
            tokenizer, purposes = roberta(), ROBERTA_PURPOSES
            fields = SIZES | dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1)
        elif name.startswith("Megatron"):
            tokenizer, purposes, fields = bert(), BERT_PURPOSES, SIZES | dict(pad_token_id=0)
        elif name.startswith("Mvp"):
            tokenizer, purposes = roberta(), ROBERTA_PURPOSES
            fields = dict(
                d_model=32, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2
            )
            fields |= dict(decoder_start_token_id=2, forced_eos_token_id=2)
            for side in ("encoder", "decoder"):
                fields |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
        else:
            tokenizer, purposes = byte_level(), dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>")
            fields = dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=64, pad_token_id=0)
        cls = getattr(transformers, name)
        config = cls.config_class(vocab_size=tokenizer.get_vocab_size(), **fields | options)
        config._attn_implementation = "eager"
        model = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        save(tokenizer, folder, model_max_length=64, **purposes)
        return folder

    return make


def pipeline(task, folder, **options):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if "Roberta" in str(folder) or "Mvp" in str(folder):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if "GPTJ" in str(folder):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return transformers.pipeline(task, model=str(folder), tokenizer=tokenizer, device="cpu", **options)


def assert_same(ours, theirs):
    """Equal but for the last digits of scores."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, (float, np.floating)):
        assert ours == pytest.approx(float(theirs), rel=2e-4, abs=1e-6)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "MegatronBertForMaskedLM"])
def test_fill_mask(make, name):
    folder = make(name)
    mask = "<mask>" if name.startswith("Roberta") else "[MASK]"
    texts = [f"the quick {mask} fox", f"{mask} of the function", f"the {mask} over {mask} dog"]
    task, theirs = inference.open_task("fill-mask", folder, batch_size=2), pipeline("fill-mask", folder)
    assert_same(task(texts), theirs(texts))
    assert_same(task(texts[0], top_k=3), theirs(texts[0], top_k=3))


CLASSIFIERS = [
    ("RobertaForSequenceClassification", (("num_labels", 3),)),
    ("MegatronBertForSequenceClassification", (("num_labels", 1),)),
    ("GPTJForSequenceClassification", (("num_labels", 3),)),
    ("MvpForSequenceClassification", (("num_labels", 3), ("problem_type", "multi_label_classification"))),
]


@pytest.mark.parametrize(("name", "options"), CLASSIFIERS)
def test_classify(make, name, options):
    folder = make(name, options)
    task, theirs = (
        inference.open_task("classify", folder, batch_size=3),
        pipeline("text-classification", folder),
    )
    assert_same(task(TEXTS, top_k=None), theirs(TEXTS, top_k=None))
    assert_same(task(TEXTS[0]), theirs(TEXTS[0], top_k=1))
    if name.startswith("Megatron"):
        pair = dict(text=TEXTS[0], text_pair=TEXTS[1])
        assert_same(task(pair)[0], theirs(pair))


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("name", ["RobertaForTokenClassification", "MegatronBertForTokenClassification"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_tag(make, name, strategy):
    folder = make_tagger(make, name)
    task = inference.open_task("tag", folder, strategy=strategy)
    theirs = pipeline("token-classification", folder, aggregation_strategy=strategy)
    for text in TEXTS:
        assert_same(task(text), theirs(text))
    assert any(task(TEXTS))


def make_tagger(make, name):
    folder = make(name, (("num_labels", 4),))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.id2label = LABELS
    config.save_pretrained(folder)
    return folder


LONG = " ".join(TEXTS[:3] * 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(top_k=4),
        dict(top_k=3, max_answer_len=4),
        dict(top_k=2, may_be_empty=True),
        dict(doc_stride=5),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["RobertaForQuestionAnswering", "MegatronBertForQuestionAnswering"])
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of torch's tensors, in transformers
def test_answer(make, name, options):
    folder = make(name)
    call = {
        "handle_impossible_answer" if key == "may_be_empty" else key: value for key, value in options.items()
    }
    task, theirs = inference.open_task("answer", folder, **options), pipeline("question-answering", folder)
    asked = [dict(question="what jumps over the dog?", context=text) for text in (TEXTS[0], LONG)]
    for one, ours in zip(asked, task(asked), strict=True):
        found = theirs(**one, **call)
        assert_same(ours, found if isinstance(found, list) else [found])


@pytest.mark.parametrize("name", ["RobertaForMultipleChoice", "MegatronBertForMultipleChoice"])
def test_choose(make, name):
    folder = make(name)
    task = inference.open_task("choose", folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
    inputs = tokenizer([TEXTS[0]] * 3, TEXTS[1:], return_tensors="pt", padding=True)
    if name.startswith("Roberta"):
        inputs.pop("token_type_ids")
    with torch.no_grad():
        scores = model(**{key: value[None] for key, value in inputs.items()}).logits[0].softmax(-1).numpy()
    (found,) = task([dict(text=TEXTS[0], choices=TEXTS[1:])])
    for one in found:
        assert one["choice"] == TEXTS[1:][one["index"]]
        assert one["score"] == pytest.approx(float(scores[one["index"]]), rel=2e-4)
    assert [one["score"] for one in found] == sorted((float(one["score"]) for one in found), reverse=True)


def test_summarize(make):
    folder = make("MvpForConditionalGeneration")
    options = dict(num_beams=3, max_new_tokens=13, min_length=4)
    theirs = pipeline("summarization", folder)
    task = inference.open_task("summarize", folder, **options)
    assert_same(
        [dict(summary_text=one["summary_text"]) for one in task(TEXTS[:2])],
        [theirs(t, **options)[0] for t in TEXTS[:2]],
    )
    assert task(TEXTS[0])["summary_text"]

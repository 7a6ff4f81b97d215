"""Tasks on texts with small models: shapes of results, batches, what is refused. tests/parity has the numbers."""

import json

import numpy as np
import pytest

import inference
import modelzoo
from inference.text_tasks import TASKS
from tests import zoo
from tests.small_tokenizers import BERT_PURPOSES, ROBERTA_PURPOSES, bert, byte_level, roberta, save

TEXTS = ["the quick brown fox", "the end", "over the lazy dog the end of main"]
BERT = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """(class, fields of the config) -> a folder with random weights and a tokenizer; one for each pair."""
    made = {}

    def make(name, **fields):
        key = name, json.dumps(fields)
        if key not in made:
            folder, cls = tmp_path_factory.mktemp(name), getattr(modelzoo, name)
            if name.startswith("Roberta"):
                tokenizer, purposes = roberta(280), ROBERTA_PURPOSES
                config = modelzoo.RobertaConfig(
                    vocab_size=tokenizer.get_vocab_size(),
                    max_position_embeddings=34,
                    pad_token_id=1,
                    **BERT,
                    **fields,
                )
            elif name.startswith("Megatron"):
                tokenizer, purposes = bert(), BERT_PURPOSES
                config = modelzoo.MegatronBertConfig(
                    vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=32, **BERT, **fields
                )
            elif name.startswith("GPT2"):
                tokenizer, purposes = byte_level(), {}
                sizes = dict(vocab_size=tokenizer.get_vocab_size(), n_positions=32, pad_token_id=0)
                config = modelzoo.get_config("tiny-gpt2", **sizes, n_layer=1, **fields)
            else:
                tokenizer, purposes = byte_level(), {}
                config = zoo.tiny_gptj(vocab_size=tokenizer.get_vocab_size(), n_layer=1, **fields)
            model = cls(config)
            modelzoo.to_hf(model, zoo.random_params(model), folder)
            save(tokenizer, folder, **purposes)
            made[key] = folder
        return made[key]

    return make


def test_one_text_is_a_batch_of_one(make):
    task = inference.open_task("fill-mask", make("RobertaForMaskedLM"), batch_size=2)
    texts = [f"{text} <mask> dog" for text in TEXTS]
    many = task(texts, top_k=3)
    assert [len(found) for found in many] == [3, 3, 3]
    for text, found in zip(texts, many, strict=True):
        alone = task(text, top_k=3)
        assert [one["token"] for one in alone] == [one["token"] for one in found]
        np.testing.assert_allclose([o["score"] for o in alone], [o["score"] for o in found], rtol=1e-5)
        assert all(one["sequence"].startswith(text.split("<mask>")[0].strip()) for one in found)
    assert len(task("<mask> and <mask>", top_k=2)) == 2


def test_int8_weights_do_tasks_too(make):
    folder = make("RobertaForMaskedLM")
    full, packed = (inference.open_task("fill-mask", folder, quantize=kind) for kind in (None, "int8"))
    one, other = (task("the <mask> dog", top_k=300) for task in (full, packed))
    scores = [{found["token"]: found["score"] for found in result} for result in (one, other)]
    assert max(abs(scores[0][token] - scores[1][token]) for token in scores[0]) < 0.02


def test_classes_have_their_names(make):
    folder = make("GPTJForSequenceClassification", id2label={0: "bad", 1: "good", 2: "so so"}, num_labels=3)
    task = inference.open_task("classify", folder)
    found = task(TEXTS, top_k=None)
    assert [{one["label"] for one in scores} for scores in found] == [{"bad", "good", "so so"}] * 3
    assert all(sum(one["score"] for one in scores) == pytest.approx(1.0) for scores in found)
    assert task(TEXTS[0]) == task([TEXTS[0]], top_k=1)[0]
    # Without a token for padding a causal model reads every text alone, and finds the same.
    bare = inference.open_task(
        "classify", make("GPTJForSequenceClassification", num_labels=3, pad_token_id=None)
    )
    for ours, theirs in zip(bare(TEXTS, top_k=None), found, strict=True):
        np.testing.assert_allclose([o["score"] for o in ours], [t["score"] for t in theirs], rtol=1e-5)


def test_answers_lie_in_the_text(make):
    task = inference.open_task("answer", make("MegatronBertForQuestionAnswering"), top_k=3)
    context = "the quick brown fox jumps over the lazy dog " * 3  # in pieces
    found = task(["what jumps?", "who is lazy?"], context=context)
    assert [len(answers) for answers in found] == [3, 3]
    for one in (one for answers in found for one in answers):
        assert context[one["start"] : one["end"]] == one["answer"]
    assert task(dict(question="what jumps?", context=context)) == found[0]


def test_choices_are_ranked(make):
    task = inference.open_task("choose", make("MegatronBertForMultipleChoice"))
    (found,) = task([dict(text="the fox", choices=TEXTS)])
    assert {one["choice"] for one in found} == set(TEXTS)
    assert sum(one["score"] for one in found) == pytest.approx(1.0)
    assert task("the fox", choices=TEXTS) == found


def test_choices_are_ranked_by_two_heads(make):
    """A choice's score is that of its last token, whatever padding follows."""
    task = inference.open_task("choose", make("GPT2DoubleHeadsModel"))
    found = {one["choice"]: one["score"] for one in task("the fox", choices=TEXTS)}
    scores = []
    for text in TEXTS:
        ids = np.array([task.encode("the fox", text).ids])
        out = task.model.apply({"params": task.loaded.params}, input_ids=ids)
        scores.append(float(out.mc_logits[0]))
    want = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose([found[text] for text in TEXTS], want, atol=1e-5)


REFUSED = [
    ("fill-mask", "RobertaForMaskedLM", ("the dog",), "has no mask: write <mask> where a word is missing"),
    ("fill-mask", "RobertaForMaskedLM", ("",), "fill-mask reads text, and got ''"),
    ("fill-mask", "RobertaForMaskedLM", ("<mask>" + " dog" * 40,), "tokens, but the model reads 32"),
    ("fill-mask", "RobertaForMaskedLM", ("\udcff <mask>",), "is not valid UTF-8"),
    ("fill-mask", "RobertaForMaskedLM", ("a <mask>", 0), "top_k = 0: it is at least 1"),
    ("answer", "MegatronBertForQuestionAnswering", ("who?",), "a context is missing"),
    ("answer", "MegatronBertForQuestionAnswering", ("fox " * 40, "the fox"), "leaves no room for the text"),
    ("choose", "MegatronBertForMultipleChoice", ("the", ["fox"]), "there are two or more to choose from"),
    (
        "classify",
        "MegatronBertForMultipleChoice",
        None,
        "does not do sequence classification: a checkpoint of",
    ),
    ("summarize", "RobertaForMaskedLM", None, "no class of its family does"),
    ("translate", "RobertaForMaskedLM", None, "unknown task 'translate': choose from fill-mask"),
]


@pytest.mark.parametrize(("task", "name", "call", "error"), REFUSED)
def test_what_is_refused(make, task, name, call, error):
    with pytest.raises(ValueError, match=error):
        inference.open_task(task, make(name))(*call or ())


def test_options_are_checked(make):
    folder = make("MegatronBertForQuestionAnswering")
    for options, error in (
        (dict(max_seq_len=99), "max_seq_len = 99: the model reads 32 tokens"),
        (dict(doc_stride=32), "doc_stride = 32"),
        (dict(top_k=0), "top_k = 0"),
        (dict(batch_size=0), "batch_size = 0"),
    ):
        with pytest.raises(ValueError, match=error):
            inference.open_task("answer", folder, **options)
    assert set(TASKS) == {"fill-mask", "classify", "answer", "tag", "choose", "summarize"}

"""Batches of texts through a model: padding, types of tokens, a mesh."""

import numpy as np
import pytest

import modelzoo
import parallel
from inference.task_model import Loaded, as_list, softmax
from inference.text_tasks import Classify
from tests import zoo
from tests.small_tokenizers import bert

CONFIG = modelzoo.get_config("tiny-megatron-bert", vocab_size=bert().get_vocab_size(), num_labels=3)
MODEL = modelzoo.MegatronBertForSequenceClassification(CONFIG)
TEXTS = ["the quick fox", "over", "the lazy dog jumps over the end", "main", "def"]


def test_rows_are_padded_and_typed():
    task = Classify(Loaded(None, MODEL, {}, bert(), {}), batch_size=3)
    pair, alone = task.encode("the fox", "over"), task.encode("the")
    inputs = {name: np.asarray(array) for name, array in task.inputs([pair, alone], 3).items()}
    assert inputs["input_ids"].shape == (3, 16)
    assert inputs["attention_mask"].sum(axis=1).tolist() == [len(pair.ids), len(alone.ids), len(pair.ids)]
    assert inputs["token_type_ids"][0, : len(pair.ids)].tolist() == pair.type_ids
    assert (inputs["input_ids"][1, len(alone.ids) :] == CONFIG.pad_token_id).all()


def test_a_mesh_finds_the_same():
    params = zoo.random_params(MODEL)
    rules = parallel.make_rules(parallel.make_mesh(data=4, tensor=2))
    alone = Classify(Loaded(None, MODEL, params, bert(), {}), batch_size=3)
    spread = Classify(
        Loaded(None, MODEL, parallel.shard_params(params, MODEL, rules), bert(), {}, rules), batch_size=3
    )
    for one, other in zip(alone(TEXTS, top_k=None), spread(TEXTS, top_k=None), strict=True):
        assert [o["label"] for o in one] == [o["label"] for o in other]
        np.testing.assert_allclose([o["score"] for o in one], [o["score"] for o in other], atol=2e-6)


def test_small_helpers():
    assert as_list("a") == (["a"], True)
    assert as_list(("a", "b")) == (["a", "b"], False)
    assert softmax(np.array([[1e4, 1e4]])).tolist() == [[0.5, 0.5]]
    task = Classify(Loaded(None, MODEL, {}, bert(), {}, cleans_up=True))
    assert task.label(1) == "LABEL_1"
    with pytest.raises(ValueError, match="MegatronBertModel does not do the task 'classify'"):
        Classify(Loaded(None, modelzoo.MegatronBertModel(CONFIG), {}, bert(), {}))

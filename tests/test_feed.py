"""A batch on its way into a step: laid on the mesh, or refused with what is wrong."""

import jax
import numpy as np
import pytest

import modelzoo
import parallel
from tests.zoo import tiny_gptj
from train.feed import Feed

MODEL = modelzoo.GPTJForCausalLM(tiny_gptj())
IDS = np.ones((8, 4), np.int32)
BATCH = {"input_ids": IDS, "labels": IDS}


def test_laid_over_the_devices_that_share_the_batch():
    rules = parallel.make_rules(parallel.make_mesh(data=4, tensor=2))
    feed = Feed(MODEL, rules, accumulate=2)
    placed = feed(BATCH)
    assert placed["input_ids"].addressable_shards[0].data.shape == (2, 4)
    assert set(feed.inputs(placed)) == {"input_ids"}
    abstract = feed({name: jax.ShapeDtypeStruct((8, 4), np.int32) for name in BATCH})
    assert abstract["labels"].sharding == placed["labels"].sharding
    with pytest.raises(ValueError, match="4 rows does not divide into accumulate=2 slices over 4 shards"):
        feed({name: value[:4] for name, value in BATCH.items()})


def test_microbatches_fill_the_stages():
    feed = Feed(MODEL, None)
    assert feed.num_microbatches(16, None, 2) == 8
    assert feed.num_microbatches(6, None, 2) == 6
    with pytest.raises(
        ValueError, match="microbatches=5 do not divide a batch of 8 rows .* nearest that does is 4"
    ):
        feed.num_microbatches(8, 5, 2)

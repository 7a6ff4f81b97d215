"""Every family takes the same training step on every kind of mesh: `make long`, for its time not in `make test`.

What is compared, and how closely, `python -m train.equivalence --help` says. Each mesh is a test of its own: one that
crashes takes no other along.
"""

import functools

import pytest

from parallel.terminal import model_of
from train import comparing, equivalence
from train.random_batch import draw_batch

pytestmark = pytest.mark.long

MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=2",
    "tensor=4",
    "tensor=4,sequence",
    "context=2",
    "context=4",
    "context=4,all-gather",
    "stage=2",
    "stage=4",
    "data=2,fsdp=2,tensor=2",
    "stage=2,data=2,tensor=2",
    "stage=2,context=2,tensor=2,sequence",
    "fsdp=2,context=2,tensor=2,sequence",
)
LAYERS = {
    "tiny-gptj": ["n_layer=4", "n_head=8", "rotary_dim=4"],
    "tiny-bloom": ["n_layer=4", "n_head=8"],
    "tiny-megatron-bert": ["num_hidden_layers=4"],
    "tiny-roberta": ["num_hidden_layers=4"],
    "tiny-mvp": ["encoder_layers=4", "decoder_layers=4"],
}
"""Four stages need four layers."""
ROWS, LENGTH, MICROBATCHES = 64, 16, 8
"""Two microbatches for each of four stages, whose rows eight shards divide."""

FEWER = ("tiny-roberta", "tiny-mvp")
"""RoBERTa has MegatronBERT's blocks, and MVP takes three times as long as any other."""
OF_FEWER = ("fsdp=8", "tensor=4,sequence", "context=4", "stage=4", *MESHES[-4:])


@functools.cache
def on_one_device(model):
    """(the problem, the reference's result)."""
    made = model_of(model, fields=LAYERS[model])
    problem = comparing.make_problem(made, draw_batch(made, ROWS, LENGTH), microbatches=MICROBATCHES)
    return problem, comparing.run_case(problem, comparing.Case())


@pytest.mark.parametrize(
    ("model", "mesh"),
    [(model, mesh) for model in LAYERS for mesh in (OF_FEWER if model in FEWER else MESHES)],
)
def test_a_mesh_is_one_device(model, mesh):
    problem, expected = on_one_device(model)
    (case,) = equivalence.cases_of(mesh, equivalence.Flags(model))
    differences = comparing.compare(expected, comparing.run_case(problem, case))
    assert {one.kind for one in differences} == {"loss", "gradient", "parameter"}
    assert all(one.is_within for one in differences), "\n".join(
        equivalence.ledger(case.label, differences, top=3)
    )


def test_schedules_are_one_device(capsys):
    flags = ["tiny-gptj", "--set", "n_layer=4", "--mesh", "stage=2,tensor=2,data=2", "--microbatches", "4"]
    for schedule in ("1f1b", "gpipe", "interleaved"):
        flags += ["--schedule", schedule]
    equivalence.main(flags)
    assert "3 of 3 agree with one device" in capsys.readouterr().out

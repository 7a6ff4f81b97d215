"""Every family takes the same training step on every kind of mesh: `make long`, for its time not in `make test`.

What is compared, and how closely, `python -m train.equivalence --help` says. Each mesh is a test of its own: one that
crashes takes no other along.
"""

import functools

import pytest

from modelzoo.registry import FAMILIES
from parallel.terminal import model_of
from tests.zoo import TINY
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
DEPTH = "num_hidden_layers"
SIZES = {
    "tiny-gptj": ["n_layer=4", "n_head=8", "rotary_dim=4"],
    "tiny-bloom": ["n_layer=4", "n_head=8"],
    "tiny-mvp": ["encoder_layers=4", "decoder_layers=4"],
}
LAYERS = {
    preset: SIZES.get(preset, [f"{FAMILIES[model_type].config_class.aliases.get(DEPTH, DEPTH)}=4"])
    for model_type, preset in TINY.items()
}
"""The smallest model of every family. Four stages need four layers."""
KNOBS = {
    "tiny-gptj": "position=learned block=sequential norm=rms activation_function=swiglu tie_word_embeddings=true",
    "tiny-bloom": "position=relative max_position_embeddings=16 block=parallel norm_placement=post",
}
"""Further fields of causal decoders; both also have grouped heads, and norms of queries and keys."""
ROWS, LENGTH, MICROBATCHES = 64, 16, 8
"""Two microbatches for each of four stages, whose rows eight shards divide."""

ON_ALL = ("tiny-gptj", "tiny-bloom", "tiny-megatron-bert")
"""RoBERTa has MegatronBERT's blocks, GPT-2 nearly BLOOM's, and MVP takes three times as long as any other."""
OF_FEWER = ("fsdp=8", "tensor=4,sequence", "context=4", "stage=4", "data=2,fsdp=2,tensor=2", *MESHES[-2:])


@functools.cache
def on_one_device(model, has_knobs=False):
    """(the problem, the reference's result)."""
    more = [*KNOBS[model].split(), "num_key_value_heads=4", "qk_norm=true"] if has_knobs else []
    made = model_of(model, fields=[*LAYERS[model], *more])
    problem = comparing.make_problem(made, draw_batch(made, ROWS, LENGTH), microbatches=MICROBATCHES)
    return problem, comparing.run_case(problem, comparing.Case())


def check_mesh(problem, expected, model, mesh):
    (case,) = equivalence.cases_of(mesh, equivalence.Flags(model))
    differences = comparing.compare(expected, comparing.run_case(problem, case))
    assert {one.kind for one in differences} == {"loss", "gradient", "parameter"}
    assert all(one.is_within for one in differences), "\n".join(
        equivalence.ledger(case.label, differences, top=3)
    )


@pytest.mark.parametrize(
    ("model", "mesh"),
    [(model, mesh) for model in LAYERS for mesh in (MESHES if model in ON_ALL else OF_FEWER)],
)
def test_a_mesh_is_one_device(model, mesh):
    check_mesh(*on_one_device(model), model, mesh)


@pytest.mark.parametrize(
    ("model", "mesh"),
    [("tiny-gptj", "fsdp=2,context=2,tensor=2,sequence"), ("tiny-bloom", "stage=2,tensor=4")],
)
def test_knobs_are_one_device(model, mesh):
    check_mesh(*on_one_device(model, has_knobs=True), model, mesh)


def test_schedules_are_one_device(capsys):
    flags = ["tiny-gptj", "--set", "n_layer=4", "--mesh", "stage=2,tensor=2,data=2", "--microbatches", "4"]
    for schedule in ("1f1b", "gpipe", "interleaved"):
        flags += ["--schedule", schedule]
    equivalence.main(flags)
    assert "3 of 3 agree with one device" in capsys.readouterr().out

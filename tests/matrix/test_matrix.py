"""Every family takes the same training step on every kind of mesh: `make long`, for its time not in `make test`.

What is compared, and how closely, `python -m train.equivalence --help` says.
"""

import pytest

from train import equivalence

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


FEWER = ("tiny-roberta", "tiny-mvp")
"""RoBERTa has MegatronBERT's blocks, and MVP takes three times as long as any other."""
OF_FEWER = ("fsdp=8", "tensor=4,sequence", "context=4", "stage=4", *MESHES[-4:])


@pytest.mark.parametrize("model", LAYERS)
def test_every_mesh_is_one_device(model, capsys):
    flags = [model, "--top", "3"]
    meshes = OF_FEWER if model in FEWER else MESHES
    for mesh in meshes:
        flags += ["--mesh", mesh]
    for field in LAYERS[model]:
        flags += ["--set", field]
    equivalence.main(flags)
    assert f"{len(meshes)} of {len(meshes)} agree with one device" in capsys.readouterr().out


def test_schedules_are_one_device(capsys):
    flags = ["tiny-gptj", "--set", "n_layer=4", "--mesh", "stage=2,tensor=2,data=2", "--microbatches", "4"]
    for schedule in ("1f1b", "gpipe", "interleaved"):
        flags += ["--schedule", schedule]
    equivalence.main(flags)
    assert "3 of 3 agree with one device" in capsys.readouterr().out

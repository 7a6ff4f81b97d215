"""`python -m train.verify`: a run that is what it claims passes, and each lie is named."""

import json
import shutil

import jax.numpy as jnp
import pytest

import modelzoo
import train
from parallel import checkpoint
from tests.test_train_main import TINY, write_corpus
from train import __main__ as entry
from train import integrity, optim, verify

ALONE = "mesh.data = 1\nmesh.fsdp = 1\nmesh.tensor = 1\n"


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run of 4 steps and a checkpoint at each second one."""
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "corpus")
    (home / "tiny.gin").write_text(TINY + ALONE + "train.num_steps = 4\ndata.validation_fraction = 0.0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        entry.main(["--gin_file=tiny.gin"])
    return home


def verdict(home, monkeypatch, capsys, *args):
    """(exit code, what was printed)."""
    monkeypatch.chdir(home)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        verify.main(args)
    captured = capsys.readouterr()
    return end.value.code, captured.out + captured.err


def retold(home, name, change):
    """A copy of the run whose last checkpoint tells another story, with checksums that fit."""
    copy = shutil.copytree(home / "run", home / name)
    file = copy / "checkpoints" / "4" / "run" / "run.json"
    story = json.loads(file.read_text())
    change(story["certificate"])
    file.write_text(json.dumps(story))
    integrity.write_checksums(checkpoint.as_path(copy / "checkpoints" / "4"))
    return name


def test_a_run_is_what_it_claims_from_its_start(home, monkeypatch, capsys):
    code, said = verdict(home, monkeypatch, capsys, "run", "--from", "0", "--to", "4")
    assert code == 0, said
    assert "steps 0 to 2: 2 batches and" in said
    assert "steps 2 to 4: 2 batches and" in said
    assert "run: steps 0 to 4 are what they claim to be" in said


def test_another_optimizer_is_found_out(home, monkeypatch, capsys):
    code, said = verdict(home, monkeypatch, capsys, "run", "--gin_param=adamw.b2=0.9")
    assert code == 1
    # The first moment and what it is made of are the same; the second is not.
    assert "DIFFERS: step 4: params." in said
    assert "is not what the replay gives" in said


def test_another_batch_is_found_out(home, monkeypatch, capsys):
    def change(certificate):
        certificate["batches"]["hashes"][1] = "0" * 64

    code, said = verdict(home, monkeypatch, capsys, retold(home, "batch", change))
    assert code == 1
    assert "DIFFERS: the batch of step 4 has hash" in said
    assert "the run learned from 0000000000000000" in said


def test_another_mesh_is_compared_within_a_tolerance(home, monkeypatch, capsys):
    def change(certificate):
        certificate["made"]["mesh"] = {"data": 8}
        certificate["state"]["params.lm_head.bias"] = "0" * 16

    # The last checkpoint's digests are not those of its state, so it may not be read as it is.
    monkeypatch.setattr(verify, "distances", lambda *_: {"params.lm_head.bias": 3e-5})
    monkeypatch.setattr(train.Saver, "restore", _unchecked(train.Saver.restore))
    code, said = verdict(home, monkeypatch, capsys, retold(home, "mesh", change))
    assert code == 0, said
    assert "compared within a tolerance, not by bits (mesh {'data': 8} there" in said
    assert "params.lm_head.bias differs most, by 3e-05" in said


def _unchecked(restore):
    def read(self, *args):
        self.digests, digests = (lambda state: {}), self.digests
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.certificate.differing", lambda found, wanted: [])
            state = restore(self, *args)
        self.digests = digests
        return state

    return read


def test_a_damaged_file_is_found_out(home, monkeypatch, capsys):
    copy = shutil.copytree(home / "run", home / "damaged")
    (copy / "checkpoints" / "2" / "tokenizer.json").write_text("{}")
    code, said = verdict(home, monkeypatch, capsys, "damaged")
    assert code == 1
    assert "DIFFERS: checkpoint 2: tokenizer.json has 2 bytes" in said


def test_distances_are_relative_to_what_moved():
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=17, n_embd=32, n_layer=1))
    state = train.init_state(model, optim.adamw())
    moved = state.replace(params={**state.params, "lm_head": _add(state.params["lm_head"], 1.0)})
    near = state.replace(params={**state.params, "lm_head": _add(state.params["lm_head"], 1.001)})
    found = verify.distances(model, near, moved, state)
    assert found["params.lm_head.bias"] == pytest.approx(1e-3, rel=1e-2)
    assert found["params.trunk.final_norm.scale"] == 0


def _add(tree, value):
    return {name: leaf + jnp.float32(value) for name, leaf in tree.items()}


@pytest.mark.parametrize(
    ("first", "last", "chosen"),
    [
        (None, None, (4, [6])),
        (None, 4, (2, [4])),
        (2, None, (2, [4])),
        (0, 6, (0, [2, 4, 6])),
        (None, 2, (0, [2])),
    ],
)
def test_steps_are_chosen(first, last, chosen):
    assert verify.choose_steps([2, 4, 6], first, last, "run") == chosen


@pytest.mark.parametrize(
    ("finished", "first", "last", "message"),
    [
        ([], None, None, "run: it has no finished checkpoint"),
        ([2, 4], 3, None, "--from 3: run has no such checkpoint: it has 2, 4"),
        ([2, 4], None, 5, "--to 5: run has no such checkpoint: it has 2, 4"),
        ([2, 4], 4, None, "--from 4: run has no checkpoint after it"),
    ],
)
def test_steps_that_are_not_there(finished, first, last, message):
    with pytest.raises(ValueError, match=message):
        verify.choose_steps(finished, first, last, "run")

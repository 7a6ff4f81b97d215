"""What a study varies: parsed by gin, combined, named, and wrong before anything runs."""

import dataclasses

import pytest

from tests.sweeps import end, write_home
from train.experiment import run_names
from train.gin_files import parse_values
from train.sweeping.arms import as_params, check_earlier, make_study, read_settings
from train.sweeping.sweep_settings import Sweep


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("arms") / "home")


@pytest.fixture(autouse=True)
def _here(home, monkeypatch):
    monkeypatch.chdir(home)


def study(*vary, params=(), **settings):
    return make_study(
        Sweep(vary=vary, **settings), settings.pop("folder", None), ["tiny.gin"], params, "command"
    )


def names(*vary, **settings):
    return [arm.name for arm in study(*vary, **settings).arms]


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("GPTJ.rotary_dim=16,32, 64", "GPTJ.rotary_dim", ["16", "32", "64"]),
        ("adamw.learning_rate=1e-3", "adamw.learning_rate", ["0.001"]),
        ("train.batch_rampup=(2, 2, 8),None", "train.batch_rampup", ["(2, 2, 8)", "None"]),
        ("train.tune=('a,b', 'c'),'.*,bias',()", "train.tune", ["('a,b', 'c')", "'.*,bias'", "()"]),
        (
            "data.mixture={'a': 0.5, 'b': 0.5},{'a': 1.0}",
            "data.mixture",
            ["{'a': 0.5, 'b': 0.5}", "{'a': 1.0}"],
        ),
        ("train.optimizer=@adamw(),@lion()", "train.optimizer", ["@adamw()", "@lion()"]),
        ("train.dtype='float32',", "train.dtype", ["'float32'"]),
    ],
)
def test_values_are_read_as_gin_reads_them(text, key, values):
    assert parse_values(text, run_names()) == (key, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GPTJ.rotary_dim", "write it as"),
        ("GPTJ.rotary_dim=", "write it as"),
        ("train.dtype=float32,bfloat16", r"cannot be read.*texts are quoted, as .train.dtype='one','two'"),
        ("train.tune=('a'", "cannot be read"),
        ("train.optimizer=@adamm()", "unknown name adamm .*did you mean adamw"),
        ("train.seed=1]\ntrain.seed=[2", "write it as|cannot be read"),
    ],
)
def test_values_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_values(text, run_names())


def test_all_combinations_by_default():
    found = study("GPTJ.rotary_dim=4,8", "GPTJ.n_layer=1,2", seeds=3)
    assert [arm.name for arm in found.arms] == [
        "rotary_dim=4, n_layer=1", "rotary_dim=4, n_layer=2", "rotary_dim=8, n_layer=1", "rotary_dim=8, n_layer=2"
    ]  # fmt: skip
    assert found.baseline == "rotary_dim=8, n_layer=1"  # the base's own values
    assert found.seeds == (0, 1, 2)
    assert found.arms[0].folder == "rotary_dim=4,n_layer=1"
    assert as_params(found.arms[0].settings) == ["GPTJ.rotary_dim=4", "GPTJ.n_layer=1"]


def test_what_an_arm_knows():
    small, large = study("GPTJ.n_layer=1,2").arms
    assert large.parameters > small.parameters > 1000
    assert (small.num_steps, small.tokens(10), small.tokens(3)) == (10, 10 * 8 * 16, 3 * 8 * 16)
    assert large.config["GPTJ.n_layer"] == "2"
    assert "train.seed" not in large.config


def test_paired_values():
    vary = ("GPTJ.rotary_dim=2,4", "GPTJ.n_layer=1,2")
    assert names(*vary, paired=True) == ["rotary_dim=2, n_layer=1", "rotary_dim=4, n_layer=2"]
    with pytest.raises(ValueError, match="--paired .*GPTJ.rotary_dim has 2, GPTJ.n_layer has 1"):
        names(vary[0], "GPTJ.n_layer=1", paired=True)


def test_values_alone():
    found = study("GPTJ.rotary_dim=4,8", "adamw.weight_decay=0.0", "train.optimizer=@lion()", alone=True)
    # 8 is the base's own
    assert [arm.name for arm in found.arms] == ["base", "rotary_dim=4", "weight_decay=0.0", "optimizer=lion"]
    assert found.baseline == "base"


def test_names_are_readable_and_apart():
    found = study("train.tune='.*bias',('.*/kernel', '.*bias')").arms
    assert found[0].name == "tune=.*bias"
    assert "/" not in found[1].folder
    assert len({arm.folder for arm in found}) == 2
    assert names("adamw.b1=0.8", "adamw.b2=0.9") == ["b1=0.8, b2=0.9"]
    twins = names("adamw.weight_decay=0.2", "lion.weight_decay=0.1", "train.optimizer=@adamw()")
    assert twins == ["adamw.weight_decay=0.2, lion.weight_decay=0.1, optimizer=adamw"]


def test_the_baseline():
    vary = "GPTJ.rotary_dim=4,8,16"
    assert study(vary).baseline == "rotary_dim=8"
    assert study("GPTJ.rotary_dim=4,16").baseline == "rotary_dim=4"
    assert study(vary, baseline="rotary_dim=16").baseline == "rotary_dim=16"
    with pytest.raises(
        ValueError, match="--baseline 'x': the arms are rotary_dim=4; rotary_dim=8; rotary_dim=16"
    ):
        study(vary, baseline="x")


def test_seeds():
    assert study("GPTJ.n_layer=1", seeds=(5, 3)).seeds == (5, 3)
    assert study("GPTJ.n_layer=1", seeds=2, params=["train.seed=7"]).seeds == (7, 8)


@pytest.mark.parametrize(
    ("vary", "params", "message"),
    [
        (
            ["GPTJ.rotary_dims=4"],
            [],
            r"arm rotary_dims=4: unknown setting GPTJ\.rotary_dims .*did you mean rotary_dim",
        ),
        (["GPTJX.n=4"], [], "arm n=4: unknown name GPTJX"),
        (["GPTJ.rotary_dim=4,'x'"], [], r"arm rotary_dim=x: GPTJ\.rotary_dim = 'x' .*str does not fit"),
        (["GPTJ.rotary_dim=7"], [], r"arm rotary_dim=7: GPTJConfig\.rotary_dim = 7"),
        (["train.seed=1,2"], [], "--seeds varies it"),
        (["train.workdir='a','b'"], [], "a study sets it itself"),
        (["GPTJ.rotary_dim=4,4"], [], "4 is there twice"),
        (["GPTJ.rotary_dim=4", "GPTJ.rotary_dim=8"], [], "names GPTJ.rotary_dim twice"),
        (["lion.b1=0.9,0.8"], [], "arms b1=0.9 and b1=0.8 are the same run"),
        (["mesh.tensor=3"], [], "arm tensor=3: .*'heads' has size 4, which mesh tensor=3 does not divide"),
        (
            ["GPTJ.n_layer=1"],
            ["data.validation_fraction=0.0"],
            "nothing is held out, so runs have no eval_loss",
        ),
        (["GPTJ.n_layer=1"], ["train.nope=1"], r"unknown setting train\.nope"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_run(vary, params, message):
    with pytest.raises(ValueError, match=message) as raised:
        study(*vary, params=params)
    assert "\n" not in str(raised.value)


def test_nothing_held_out_is_no_matter_for_a_training_loss():
    assert study("GPTJ.n_layer=1", metric="loss", params=["data.validation_fraction=0.0"]).metric == "loss"


def test_settings_of_a_study_in_a_file_and_flags_that_win(home):
    (home / "study.gin").write_text(
        "include 'tiny.gin'\nsweep.vary = ['GPTJ.rotary_dim=4,8']\nsweep.seeds = 3\nsweep.paired = True\n"
    )
    found, folder = read_settings(["study.gin"], [], {})
    assert (found.vary, found.seeds, found.paired, str(folder)) == (
        ["GPTJ.rotary_dim=4,8"], 3, True, "runs/sweeps/study"
    )  # fmt: skip
    found, folder = read_settings(["study.gin"], [], {"seeds": (1, 2), "workdir": "there", "alone": True})
    assert (found.seeds, found.paired, found.alone, str(folder)) == ((1, 2), False, True, "there")
    with pytest.raises(ValueError, match=r"sweep\.seeds = 0.*study\.gin:1|sweep\.seeds = 0"):
        read_settings(["study.gin"], ["sweep.seeds=0"], {})


def test_a_studys_file_is_also_a_run(home):
    from train.experiment import Experiment

    (home / "study.gin").write_text("include 'tiny.gin'\nsweep.vary = ['GPTJ.rotary_dim=4,8']\n")
    assert Experiment(["study.gin"]).unused() == []


def test_runs_of_other_settings_are_refused(home):
    before = dataclasses.replace(study("GPTJ.n_layer=1,2"), folder=home / "runs")
    now = dataclasses.replace(study("GPTJ.n_layer=1,2", params=["adamw.b1=0.8"]), folder=home / "runs")
    check_earlier(now, before)  # nothing was run yet
    end(before.runs[0], {})
    check_earlier(before, before)
    check_earlier(before, None)
    with pytest.raises(
        ValueError, match=r"runs of arm n_layer=1 with other settings: adamw\.b1 was 0\.9, is 0\.8"
    ):
        check_earlier(now, before)
    longer = study("GPTJ.n_layer=1,2,3", params=["train.log_every=7"], seeds=5)
    check_earlier(dataclasses.replace(longer, folder=home / "runs"), before)  # more arms and seeds


def test_a_field_that_is_newer_than_the_runs_is_no_change(home):
    now = dataclasses.replace(study("GPTJ.n_layer=1"), folder=home / "older")
    end(now.runs[0], {})

    def without(name):
        config = {key: value for key, value in now.arms[0].config.items() if not key.startswith(name)}
        return dataclasses.replace(now, arms=(dataclasses.replace(now.arms[0], config=config),))

    check_earlier(now, without("GPTJ.position"))
    with pytest.raises(ValueError, match="adamw.* was None"):
        check_earlier(now, without("adamw."))

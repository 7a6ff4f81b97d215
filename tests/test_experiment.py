"""train/experiment.py: what the settings of a run build, and which changes a checkpoint allows."""

import jax
import pytest

from modelzoo import GPTJConfig, get_config
from train.experiment import Experiment, Run, run_names

LEAST = {
    "train.workdir": "'run'",
    "train.num_steps": "10",
    "train.global_batch_size": "8",
    "train.sequence_length": "16",
    "train.model_class": "'GPTJForCausalLM'",
    "train.optimizer": "@adamw()",
    "data.path": "'stdlib'",
}


def experiment(**changes):
    settings = {**LEAST, **{key.replace("__", "."): value for key, value in changes.items()}}
    return Experiment(gin_params=[f"{key}={value}" for key, value in settings.items()])


@pytest.mark.parametrize("key", list(LEAST))
def test_each_required_setting_is_asked_for(key):
    params = [f"{name}={value}" for name, value in LEAST.items() if name != key]
    with pytest.raises(ValueError, match=rf"^{key} is not set"):
        Experiment(gin_params=params)


def test_config_starts_from_the_preset_or_the_family():
    assert experiment().config == GPTJConfig()
    assert experiment(train__preset="'tiny-gptj'").config == get_config("tiny-gptj")
    assert experiment(train__preset="'tiny-gptj'", GPTJ__n_layer="5").config == get_config(
        "tiny-gptj", n_layer=5
    )


def test_model_takes_the_run_s_dtype_and_remat():
    model = experiment(train__dtype="'bfloat16'", train__remat="'full'").model
    assert (model.dtype, model.param_dtype, model.remat) == (jax.numpy.bfloat16, jax.numpy.float32, "full")


def test_the_schedule_reaches_the_run_s_last_step():
    built = experiment(adamw__learning_rate="@warmup_linear()", warmup_linear__peak="1.0")

    assert float(built.learning_rate(9)) == 0.0
    assert float(built.learning_rate(0)) > 0.8
    assert built.flat["warmup_linear.num_steps"] == "10"
    assert built.unused() == []


def test_the_learning_rate_is_known_without_a_schedule():
    assert experiment().learning_rate == 3e-4
    assert experiment(adamw__learning_rate="0.5").learning_rate == 0.5


def test_the_resolved_text_holds_every_value_and_reads_back(tmp_path):
    built = experiment(train__preset="'tiny-gptj'", GPTJ__n_layer="5", rules__vocab="None")
    file = tmp_path / "config.gin"
    file.write_text(built.text)
    again = Experiment([str(file)])

    assert again.text == built.text
    assert again.config == built.config
    assert "GPTJ.n_layer = 5\n" in built.text
    assert "GPTJ.vocab_size = 256\n" in built.text
    assert "rules.vocab = None\n" in built.text
    assert "adamw.b1 = 0.9\n" in built.text
    assert again.make_rules(jax.devices()[:1]) == built.make_rules(jax.devices()[:1])


def test_rules_and_mesh_come_from_gin():
    built = experiment(train__preset="'tiny-gptj'", mesh__fsdp="-1", mesh__tensor="2", rules__head_dim="()")
    rules = built.make_rules()

    assert dict(rules.mesh.shape) == {"stage": 1, "data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert rules.mesh_axes("head_dim") == ()


def test_no_name_offers_what_the_program_supplies():
    names = run_names()

    assert "devices" not in names["mesh"].defaults
    assert "mesh" not in names["rules"].defaults
    assert "model_vocab_size" not in names["data"].defaults
    assert "mask" not in names["adamw"].defaults
    assert "decay_mask" not in names
    assert {"train", "data", "mesh", "rules", "GPTJ", "adamw", "warmup_cosine", "constant"} <= set(names)


def test_every_setting_of_a_run_is_explained():
    documented = Run.__doc__ or ""
    assert all(f"        {name}: " in documented for name in run_names()["train"].defaults)


def save(tmp_path, text):
    folder = tmp_path / "4"
    folder.mkdir()
    (folder / "config.gin").write_text(text)
    return folder


@pytest.mark.parametrize(
    "free",
    [
        {"train__workdir": "'elsewhere'"},
        {"train__num_steps": "20", "adamw__learning_rate": "@warmup_linear()", "warmup_linear__peak": "1.0"},
        {"train__remat": "'full'", "train__log_every": "3", "train__keep_checkpoints": "1"},
        {"mesh__fsdp": "-1", "rules__vocab": "None", "data__cache_dir": "'x'"},
    ],
)
def test_how_and_where_a_run_computes_may_change(tmp_path, free):
    same = {key: value for key, value in free.items() if key.startswith(("adamw", "warmup"))}
    folder = save(tmp_path, experiment(**same).text)

    assert experiment(**free).check_resume(folder) is None


def test_what_a_run_computes_may_not_change_unasked(tmp_path):
    folder = save(tmp_path, experiment().text)
    changed = {"train__seed": "1", "data__max_bytes": "9"}

    with pytest.raises(
        ValueError, match=r"other settings: train\.seed was 0, is 1; data\.max_bytes was None, is 9;"
    ):
        experiment(**changed).check_resume(folder)
    assert experiment(**changed, train__allow_changes="True").check_resume(folder) is None


def test_another_model_is_never_gone_on_with(tmp_path):
    folder = save(tmp_path, experiment().text)
    with pytest.raises(
        ValueError, match=r"of another model: GPTJ\.n_layer was 28, is 3; choose another train\.workdir$"
    ):
        experiment(GPTJ__n_layer="3", train__allow_changes="True").check_resume(folder)

    folder.joinpath("config.gin").write_text(experiment().text.replace("GPTJ", "Other"))
    with pytest.raises(
        ValueError, match=r"other model: train\.model_class was 'OtherForCausalLM', is 'GPTJForCausalLM';"
    ):
        experiment().check_resume(folder)


def test_the_folder_of_the_run_is_tried(tmp_path):
    experiment(train__workdir=repr(str(tmp_path / "a" / "b"))).check_workdir()
    assert list(tmp_path.iterdir()) == []  # a run that is refused later leaves nothing

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"train\.workdir = '.*file/run' \(--gin_param.*: cannot write there"):
        experiment(train__workdir=repr(str(tmp_path / "file" / "run"))).check_workdir()

"""From a run of a study to its command."""

from tests.small_study import small_study
from train.sweeping.jobs import make_job


def test_the_command_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    study = small_study(tmp_path / "study")
    job = make_job(study, study.runs[4])

    assert job.arguments == (
        "--gin_file=tiny.gin",
        "--gin_param=x.y=1",
        "--gin_param=GPTJ.a=2",
        "--gin_param=train.seed=1",
        f"--gin_param=train.workdir='{tmp_path}/study/a=2/seed-1'",
    )
    assert (job.workplace, job.folder) == (str(tmp_path), f"{tmp_path}/study/a=2/seed-1")
    assert job.variables["JAX_PLATFORMS"] == "cpu"
    assert job.variables["JAX_COMPILATION_CACHE_DIR"] == "/mine"  # what the user has set stays
    assert job.stop == f"{tmp_path}/study/stop"


def test_runs_share_compiled_programs(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    study = small_study(tmp_path / "study")
    caches = {make_job(study, run).variables["JAX_COMPILATION_CACHE_DIR"] for run in study.runs}
    assert caches == {f"{tmp_path}/study/compile-cache"}


def test_no_secrets_are_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    study = small_study(tmp_path / "study")
    assert "hunter2" not in make_job(study, study.runs[0]).script()


def test_weights_and_biases_knows_the_arm(tmp_path):
    study = small_study(tmp_path / "study")
    assert "WANDB_RUN_GROUP" not in make_job(study, study.runs[0]).variables
    study.arms[0].config["train.wandb"] = "'project'"
    variables = make_job(study, study.runs[0]).variables
    assert (variables["WANDB_RUN_GROUP"], variables["WANDB_JOB_TYPE"]) == ("study", "a=1")

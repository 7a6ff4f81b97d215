"""train/listing.py: the table of `python -m train --list` says what the signatures and the files say."""

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest

import modelzoo
from tests.house import ROOT
from train import __main__ as entry
from train.experiment import CONFIGS, run_names
from train.gin_files import Settings
from train.listing import COLUMNS, lines, rows
from train.listing import ROOT as LISTED
from train.run_settings import Run


def listed(*files, params=(), wanted=()):
    settings = Settings(run_names(), files, params, [CONFIGS], complete=False)
    return {row.name: row for row in rows(settings, wanted)}


def test_every_setting_is_listed_with_its_default():
    found = listed()
    for name, entry_of in run_names().items():
        assert {f"{name}.{parameter}" for parameter in entry_of.defaults} <= found.keys()
    for field in dataclasses.fields(Run):
        row = found[f"train.{field.name}"]
        missing = field.default is dataclasses.MISSING
        assert row.default == ("required" if missing else repr(field.default))
        assert row.text
        assert not row.value
    assert found["GPTJ.n_layer"].type == "int"
    assert found["GPTJ.n_layer"].default == str(modelzoo.GPTJConfig().n_layer)
    assert found["Roberta.hidden_size"].text  # said by the class that it inherits from


def test_values_and_where_they_are_set():
    found = listed("pretrain/gptj-6b.gin", params=["train.seed=3"])
    row = found["mesh.tensor"]
    assert (row.value, row.default) == ("4", "1")
    line = (CONFIGS / "parallel/fsdp-tensor.gin").read_text().splitlines().index("  tensor = 4") + 1
    assert row.where.endswith(f"configs/parallel/fsdp-tensor.gin:{line}")
    assert (found["train.seed"].value, found["train.seed"].where) == ("3", '--gin_param="train.seed=3"')
    assert found["train.optimizer"].value == "@adamw()"
    assert found["train.workdir"].value == "required"  # and still it is listed
    assert not found["lora.rank"].value


def test_a_preset_gives_values():
    found = listed(params=["train.preset='tiny-gptj'"])
    assert (found["GPTJ.n_embd"].value, found["GPTJ.n_embd"].where) == ("64", "preset tiny-gptj")
    found = listed(params=["train.preset='tiny-gptj'", "GPTJ.n_embd=32"])
    assert found["GPTJ.n_embd"].value == "32"
    assert "--gin_param" in found["GPTJ.n_embd"].where


def test_where_a_setting_is_used():
    found = listed()
    for row in found.values():
        for file in row.used.partition(": ")[0].split(" and ")[0].split(", "):
            assert (LISTED / file).is_file(), row
    assert found["train.log_every"].used.startswith("train/")
    assert found["mesh.fsdp"].used == "parallel/mesh.py: make_mesh"
    assert found["GPT2.scale_attn_weights"].used == "modelzoo/gpt2/model.py"
    assert "modelzoo/tasks.py" in found["GPT2.tie_word_embeddings"].used
    assert not any("mvp" in row.used for name, row in found.items() if name.startswith("GPTJ."))


def test_names_choose():
    assert set(listed(wanted=["learning_rate"])) == {
        f"{name}.{setting}"
        for name, one in run_names().items()
        for setting in one.defaults
        if "learning_rate" in setting
    }
    assert all(name.startswith(("mesh.", "GPTJ.")) for name in listed(wanted=["mesh.", "gptj."]))
    with pytest.raises(ValueError, match="no setting is called nonsense: the names are train, data"):
        listed(wanted=["nonsense"])


def test_lines_are_a_table():
    found = list(listed(wanted=["rotary_dim"]).values())
    head, *rest = lines(found, with_texts=True)
    assert [head.index(column) for column in (*COLUMNS, "what it is")] == sorted(
        head.index(column) for column in (*COLUMNS, "what it is")
    )
    assert len(rest) == len(found)
    row = next(line for line in rest if line.startswith("GPTJ.rotary_dim"))
    assert row[head.index("default") :].startswith("64")
    assert "rotate" in row


def test_on_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(entry, "train", None)
    entry.main(["--gin_file=quickstart.gin", "--list"])
    out = capsys.readouterr().out
    assert "quickstart.gin:" in out
    assert len(out.splitlines()) > 200
    with pytest.raises(SystemExit):
        entry.main(["quickstart.gin"])
    assert "gin files follow --gin_file=" in capsys.readouterr().err


def test_on_a_terminal(monkeypatch, capsys):
    from train import listing

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    listing.show(list(listed(wanted=["data.path"]).values()), with_texts=True)
    out = capsys.readouterr().out
    assert "str | list[str] | None" in out  # not taken for rich's markup


def test_nothing_is_asked_of_devices():
    code = (
        "import json; from train.__main__ import main; main(['--list', 'seed']); "
        "from jax._src import xla_bridge; print(json.dumps(list(xla_bridge._backends)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "train.seed" in done.stdout
    assert inspect.isfunction(entry.main)

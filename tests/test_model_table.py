"""The README's table of models is what the registry and the parity results say, and they say that all is well."""

import importlib.util
import json
from typing import Any

import pytest

from modelzoo import registry
from tests.house import ROOT

CLASSES = [cls for family in registry.FAMILIES.values() for cls in family.classes]
LIMITS = {"outputs": 2e-5, "loss": 1e-5, "gradient": 1e-4}


@pytest.fixture(scope="module")
def model_table() -> Any:
    spec = importlib.util.spec_from_file_location("model_table", ROOT / "docs/model_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(model_table) -> dict[str, dict[str, Any]]:
    return json.loads(model_table.RESULTS.read_text(encoding="utf-8"))


def test_readme_is_up_to_date(model_table, results):
    readme = model_table.README.read_text(encoding="utf-8")
    assert model_table.updated(readme, model_table.render(results)) == readme, "run `make table`"


def test_every_class_was_measured(results):
    assert results.keys() == {cls.__name__ for cls in CLASSES}
    for cls in CLASSES:
        wanted = {"outputs"} if cls.task == "base" else set(LIMITS)
        measured = results[cls.__name__]
        assert measured.keys() == wanted | {"configs"}, cls.__name__
        assert all(0 <= measured[key] <= LIMITS[key] for key in wanted), cls.__name__
        assert measured["configs"] >= 3, cls.__name__


def test_a_row_for_every_class(model_table):
    rows = model_table.rows({"GPTJModel": {"outputs": 1.6e-6, "configs": 5}})
    assert [row[1].strip("`") for row in rows] == [cls.__name__ for cls in CLASSES]
    assert rows[0][0] == "[GPT-J](modelzoo/gptj/model.py)"
    assert rows[0][4:] == ["2e-06", "", ""]


def test_a_readme_without_its_place_is_refused(model_table):
    with pytest.raises(ValueError, match="are missing"):
        model_table.updated("# flaxtron\n", "table")

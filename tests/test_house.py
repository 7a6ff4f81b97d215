"""The rules of tests/house.py hold in the repository, and each finds a violation planted for it."""

import json
from collections.abc import Callable
from pathlib import PurePosixPath

import pytest

from tests import house
from tests.house import Source

PLANTED = [
    (house.imports_run_one_way, "modelzoo/planted.py", "def f():\n    from parallel import mesh\n"),
    (house.imports_run_one_way, "parallel/planted.py", "import train.step\n"),
    (house.imports_run_one_way, "train/data/planted.py", "from ...inference import decode\n"),
    (
        house.imports_run_one_way,
        "inference/planted.py",
        "import importlib\nimportlib.import_module('train')\n",
    ),
    (house.only_architectures_know_architectures, "parallel/planted.py", "from modelzoo.gptj import model\n"),
    (house.only_entry_points_read_gin_or_flags, "train/planted.py", "if True:\n    import gin\n"),
    (house.only_entry_points_read_gin_or_flags, "train/planted.py", "from absl import flags\n"),
    (house.only_entry_points_read_gin_or_flags, "parallel/planted.py", "import sys\nname = sys.argv[1]\n"),
    (house.library_imports_no_entry_point, "train/__init__.py", "from train.sweep import table\n"),
    (house.library_imports_no_entry_point, "inference/planted.py", "from inference import serve\n"),
    (house.entry_points_are_listed, "train/planted.py", "if __name__ == '__main__':\n    pass\n"),
    (house.entry_points_are_listed, "train/sweep.py", "def main(): ...\n"),
    (house.torch_is_never_imported, "modelzoo/planted.py", "def f():\n    import torch.nn\n"),
    (house.mesh_axes_are_spelled_in_parallel_only, "modelzoo/planted.py", "axes = ('embed', 'tensor')\n"),
    (house.mesh_axes_are_spelled_in_parallel_only, "train/planted.py", "spec = P(None, ('data', 'x'))\n"),
    (house.imports_are_declared, "train/planted.py", "import yaml\n"),
    (house.files_are_short, "train/planted.py", "x = 1\n" * (house.MAX_LINES + 1)),
    (house.every_test_asserts, "tests/test_planted.py", "def test_runs():\n    print(1 + 1)\n"),
]


@pytest.mark.parametrize(
    "rule", dict.fromkeys(rule for rule, _, _ in PLANTED), ids=lambda rule: rule.__name__
)
def test_rule_holds(rule: Callable[[Source], list[str]]) -> None:
    subjects: dict[object, list[Source]] = {
        house.files_are_short: house.EVERYTHING,
        house.every_test_asserts: house.TESTS,
    }
    sources = subjects.get(rule, house.LIBRARY)
    assert sources, "found no source files; has the layout moved?"
    violations = [violation for source in sources for violation in rule(source)]
    assert not violations, "\n".join(["", *violations])


@pytest.mark.parametrize(
    ("rule", "path", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", None)
)
def test_rule_finds_a_planted_violation(rule: Callable[[Source], list[str]], path: str, text: str) -> None:
    assert len(rule(Source(PurePosixPath(path), text))) == 1


def test_no_function_has_a_module_name() -> None:
    violations = house.no_function_has_a_module_name(house.LIBRARY)
    assert not violations, "\n".join(["", *violations])


def test_a_function_with_a_module_name_is_found() -> None:
    defined = Source(PurePosixPath("train/planted.py"), "def step(): ...\n")
    imports = "from train.planted import loss as step\nfrom train import step\n"
    imported = Source(PurePosixPath("train/__init__.py"), imports)
    step = Source(PurePosixPath("train/step.py"), "")
    assert house.no_function_has_a_module_name([step]) == []
    assert len(house.no_function_has_a_module_name([defined, step])) == 1
    assert len(house.no_function_has_a_module_name([imported, step])) == 1


def test_architectures_repeat_nothing() -> None:
    violations = house.architectures_repeat_nothing(house.LIBRARY)
    assert not violations, "\n".join(["", *violations])


def test_a_repetition_is_found() -> None:
    text = "\n\n".join(f"line {i}" for i in range(6))
    one, two, other = (
        Source(PurePosixPath(path), text)
        for path in ("modelzoo/one/model.py", "modelzoo/two/model.py", "train/step.py")
    )
    assert house.architectures_repeat_nothing([one, other]) == []
    assert len(house.architectures_repeat_nothing([one, two])) == 1
    shorter = Source(two.path, text.replace("line 5", "another"))
    assert house.architectures_repeat_nothing([one, shorter]) == []


def test_every_source_has_a_test() -> None:
    violations = house.every_source_has_a_test(house.LIBRARY, house.TESTS)
    assert not violations, "\n".join(["", *violations])


@pytest.mark.parametrize(
    ("source", "test", "mirrored"),
    [
        ("parallel/rules.py", "tests/test_rules.py", True),
        ("parallel/rules.py", "tests/sharding/test_parallel_rules.py", True),
        ("parallel/rules.py", "tests/test_mesh.py", False),
        ("modelzoo/gptj/config.py", "tests/test_gptj_config.py", True),
        ("modelzoo/gptj/config.py", "tests/test_gptj.py", True),
        ("modelzoo/gptj/config.py", "tests/test_config.py", False),
        ("modelzoo/config.py", "tests/test_config.py", True),
        ("train/__main__.py", "tests/test_train_main.py", True),
        ("train/__main__.py", "tests/test_main.py", False),
    ],
)
def test_mirror_names(source: str, test: str, mirrored: bool) -> None:
    neighbours = ["modelzoo/config.py", "modelzoo/gptj/model.py", "modelzoo/gptj/config.py"]
    neighbours += ["parallel/rules.py", "train/__main__.py", "inference/__main__.py"]
    sources = [Source(PurePosixPath(path), "") for path in neighbours]
    tests = [Source(PurePosixPath(test), "def test_something(): ...\n")]
    missing = house.every_source_has_a_test(sources, tests)
    assert any(line.startswith(f"{source}:") for line in missing) is not mirrored
    assert len(house.every_source_has_a_test(sources, [Source(PurePosixPath(test), "")])) == len(sources)


def test_notebooks_hold_no_output() -> None:
    full = [
        file.name
        for file in sorted((house.ROOT / "notebooks").glob("*.ipynb"))
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
        if cell.get("outputs") or cell.get("execution_count")
    ]
    assert not full, f"strip the outputs with `.venv/bin/python -m nbstripout`: {sorted(set(full))}"

"""Every command line answers `--help` before JAX is there, which takes seconds to import."""

import json
import re
import subprocess
import sys

import pytest

from tests.house import ENTRY_POINTS, LIBRARY, ROOT

COMMANDS = sorted(
    ".".join(source.module).removesuffix(".__main__")
    for source in LIBRARY
    if source.path.name == "__main__.py" or str(source.path) in ENTRY_POINTS
)
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "tensorstore", "matplotlib")
# One process for all of them: what one loads is seen at the next, so the first that loads too much is named.
ASK = f"""
import contextlib, io, json, runpy, sys
found = {{}}
for name in sys.argv[1:]:
    out, sys.argv = io.StringIO(), [name, "--help"]
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__")
    found[name] = len(out.getvalue()), [heavy for heavy in {HEAVY} if heavy in sys.modules]
print(json.dumps(found))
"""


def ask(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_answers_at_once():
    assert {"train", "inference", "modelzoo.convert", "parallel.explain"} <= set(COMMANDS)
    found = ask(ASK, *COMMANDS)
    assert found.keys() == set(COMMANDS)
    for name, (length, loaded) in found.items():
        assert length > 200, f"python -m {name} --help says nothing"
        assert not loaded, f"python -m {name} --help imports {loaded}"


def test_gin_files_of_the_examples_are_there():
    """Those that begin with a folder of configs/, and quickstart.gin; others are a user's own."""
    folders = [folder.name for folder in (ROOT / "configs").iterdir() if folder.is_dir()]
    for source in LIBRARY:
        for file in re.findall(r"--gin_file=(?:configs/)?([\w./-]+\.gin)", source.text):
            if file.split("/")[0] in [*folders, "quickstart.gin"]:
                assert (ROOT / "configs" / file).is_file(), f"{source.path} names {file}, which is not there"


@pytest.mark.parametrize("package", ["modelzoo", "parallel", "train", "inference"])
def test_packages_load_what_is_used(package):
    """Their names are there without it: in `dir` or `__all__`, and each is found."""
    code = f"import json, sys, {package}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert ask(code) == []
    module = __import__(package)
    assert len(module.__all__) > 5
    assert all(getattr(module, name) is not None for name in module.__all__)

"""Every code block of the documentation does what it says: `make docs` runs this, `make test` does not.

A page's blocks run in order in a folder of their own: python blocks in one namespace on eight simulated devices, bash
blocks in bash, gin blocks on top of configs/quickstart.gin up to a built experiment. tests/docs/stand_ins.py makes the
small things that stand for checkpoints and runs, tests/docs/shortened.py makes commands short. Of a block that cannot
run here, which says why (tests/docs/blocks.py), its syntax, flags, files and names are checked.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs import checks, stand_ins
from tests.docs.blocks import ROOT, Block, pages, read_blocks
from tests.docs.shortened import COMPILING

SECONDS = 600  # that a block may take
KEPT = "FLAXTRON_DOCS_MADE"  # a folder that keeps the stand-ins from one run to the next, for whoever writes a page
LINKED = ("configs", "docs", "benchmarks", "README.md")


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """The folder of stand-ins, made by whichever worker comes first."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    root = Path(os.environ.get(KEPT, root)).absolute()
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "made.done").exists():
            stand_ins.make(root / "made")
            shims = root / "made/shims"
            shims.mkdir()
            for tool in ("python", "python3", "pip", "make"):
                kind = tool.rstrip("3")
                (shims / tool).write_text(
                    f'#!/bin/sh\nexec "{sys.executable}" -P "{ROOT}/tests/docs/shortened.py" {kind} "$@"\n'
                )
                (shims / tool).chmod(0o755)
            (root / "made.done").touch()
    return root / "made"


class Scratch:
    """The folder that a page's blocks run in.

    Args:
        folder: empty.
        made: the stand-ins.
        page: path from the repository's root.
    """

    def __init__(self, folder: Path, made: Path, page: str):
        self.folder, self.made = folder, made
        self.space: dict[str, Any] = {"__name__": "__main__"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in stand_ins.names(made):
            # What the page itself makes has no stand-in.
            if (folder / name).exists() or f"train.workdir='{name}'" in text:
                continue
            if name.startswith("runs/") and name.count("/") == 1:
                shutil.copytree(made / name, folder / name, copy_function=_link_large)
            elif (
                not (made / name).is_dir()
                or (made / name / "config.json").exists()
                or name in ("my/texts", "step_383500", "checkpoints/gpt2")
            ):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(made / name)

    def run(self, block: Block) -> None:
        """Runs a block; an exception says what went wrong."""
        text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        if block.language == "python":
            # At the lines that it has in the page, for tracebacks.
            exec(compile("\n" * (block.line - 1) + text, str(ROOT / block.page), "exec"), self.space)
        elif block.language == "bash":
            self.run_bash(text)
        elif block.language == "gin":
            build_experiment(text, self.folder)
        else:
            json.loads(text)

    def run_bash(self, text: str) -> None:
        """Runs commands as a user would."""
        unwanted = ("JAX_NUMPY_DTYPE_PROMOTION", "PYTEST_", "COV_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
        environment |= {
            "PATH": f"{self.made / 'shims'}:{os.environ['PATH']}",
            "XLA_FLAGS": COMPILING,
            "XDG_CACHE_HOME": str(self.made / "cache"),
            "DOCS_PORT": str(self.port),
        }
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise RuntimeError(
                f"took more than {SECONDS} s: shorten it, or say <!-- not run: REASON -->"
            ) from None
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}\n{output[-3000:]}")

    def close(self) -> None:
        """Ends what a block started and left running."""
        if (self.folder / "server.pid").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((self.folder / "server.pid").read_text()), signal.SIGKILL)
        shutil.rmtree(self.folder)


def _link_large(source: str, target: str) -> None:
    if os.path.getsize(source) > 2**20:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def build_experiment(text: str, folder: Path) -> None:
    """Builds what a gin file describes, or what it changes about the quickstart's run."""
    from train.experiment import Experiment

    file = folder / "block.gin"
    file.write_text(text)
    whole = "include " in text or "train.model_class" in text
    experiment = Experiment(
        [*([] if whole else ["quickstart.gin"]), str(file)],
        [] if "train.workdir" in text or not whole else ["train.workdir='runs/x'"],
    )
    assert experiment.model is not None
    assert experiment.optimizer is not None
    experiment.make_rules()


@pytest.fixture
def scratch(request, tmp_path, made, monkeypatch) -> Iterator[Scratch]:
    import jax

    found = Scratch(tmp_path, made, request.getfixturevalue("page"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield found
    found.close()
    jax.clear_caches()


@pytest.mark.parametrize(
    "page", [page for page in pages() if "```" in (ROOT / page).read_text(encoding="utf-8")]
)
def test_blocks(page: str, scratch: Scratch, record_property) -> None:
    failures = []
    for block in read_blocks(page):
        began = time.monotonic()
        try:
            if block.not_run is None:
                scratch.run(block)
            else:
                assert not (found := checks.check(block)), "; ".join(found)
        except Exception as error:
            lines = (
                []
                if isinstance(error, RuntimeError) and block.language == "bash"
                else traceback.format_exc(limit=-3).splitlines()[-12:-1]
            )
            failures.append(
                f"{block.where} ({block.language}): {type(error).__name__}: {error}\n" + "\n".join(lines)
            )
        record_property("block", (block.where, block.language, block.not_run, time.monotonic() - began))
    assert not failures, "\n\n".join([f"{len(failures)} blocks fail", *failures])


@pytest.mark.parametrize("page", pages())
def test_links(page: str) -> None:
    assert not checks.check_links(ROOT / page)

"""What holds of a block that cannot run here: its syntax, our programs and their flags, gin files and names."""

import ast
import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.docs.blocks import ROOT, Block

OURS = ("modelzoo", "parallel", "train", "inference", "benchmarks")
_SETTING = re.compile(r"^\s*(\w+)\.(\w+)\s*=", re.MULTILINE)


def check(block: Block) -> list[str]:
    """What is wrong with a block, as far as one can know without running it."""
    return {"python": _python, "bash": _bash, "gin": _gin, "json": _json}[block.language](block.text)


def _json(text: str) -> list[str]:
    json.loads(text)
    return []


def _gin(text: str) -> list[str]:
    return _settings(_SETTING.findall(text))


def _python(text: str) -> list[str]:
    """Syntax, and that our packages have the names that are used of them."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OURS[:4]:
            known = hasattr(importlib.import_module(node.value.id), node.attr)
            found += [] if known else [f"{node.value.id} has no {node.attr}"]
    return found


def _bash(text: str) -> list[str]:
    """Syntax; modules, flags, gin files and settings of our own programs."""
    result = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    found = result.stderr.splitlines()
    ours = re.compile(rf"python3? -m ((?:{'|'.join(OURS)})\b[^|;&>]*)")
    for line in text.replace("\\\n", " ").splitlines():
        for command in ours.findall(line):
            found += _command(_words(command))
    return found


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command, comments=True)
    except ValueError:  # a command within quotes, as in --command "python -m train ..."
        return [word.strip("'\"") for word in command.split()]


def _command(words: list[str]) -> list[str]:
    module, *args = words
    task = args[:1] if args and re.fullmatch(r"[a-z][a-z-]+", args[0]) else []
    known = help_of(module, *task)
    if known is None and task:
        known = help_of(module)
    if known is None:
        return [f"python -m {module} does not answer --help"]
    found = []
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if not flag.startswith("--"):
            continue
        if not re.search(rf"{re.escape(flag).replace('_', '[-_]')}\b", known.replace("-\n", "-")):
            found.append(f"python -m {module} has no {flag}")
        value = value if equals else (args[i + 1] if i + 1 < len(args) else "")
        if (
            flag == "--gin_file"
            and "$" not in value
            and not any((ROOT / place / value).is_file() for place in ("", "configs"))
        ):
            found.append(f"there is no {value}")
        if flag == "--gin_param":
            found += _settings(re.findall(r"^(\w+)\.(\w+)\s*=", value))
    return found


@functools.cache
def help_of(module: str, *task: str) -> str | None:
    """What a program says of itself; None if it fails."""
    command = [sys.executable, "-m", module, *task, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return result.stdout if result.returncode == 0 else None


def _settings(pairs: list[tuple[str, str]]) -> list[str]:
    from train.experiment import run_names

    names = run_names()
    return [
        f"gin knows no {name}.{parameter}"
        for name, parameter in pairs
        if parameter not in getattr(names.get(name), "defaults", {})
    ]


def check_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return [f"{page}: no {link}" for link in found if not (page.parent / link).exists()]

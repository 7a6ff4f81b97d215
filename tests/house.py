"""The house rules that a reader relies on, held by reading every source file's syntax tree.

A rule is a function from a source file, or from all of them, to the violations it finds. tests/test_house.py
runs each twice: over the repository, and over a planted violation.

The mirror rule: PACKAGE/SUB/FILE.py has tests in a file whose name is `test_` and the end of that path, as
much of it as tells the file from the others: tests/test_rules.py for parallel/rules.py,
tests/test_gptj_config.py for modelzoo/gptj/config.py, tests/test_train_main.py for train/__main__.py. Where
two files could claim a test, the shallower one does. Folders under tests/ are free. An architecture's folder
is wiring and may be mirrored whole: tests/test_gptj.py.
"""

import ast
import functools
import itertools
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
# Each package and those of ours that it may import.
MAY_IMPORT = {
    "modelzoo": set(),
    "parallel": {"modelzoo"},
    "train": {"modelzoo", "parallel"},
    "inference": {"modelzoo", "parallel"},
}
OURS = {*MAY_IMPORT, "benchmarks", "notebooks", "tests"}
# What `python -m` runs beside PACKAGE/__main__.py. Entry points alone read gin files and flags.
ENTRY_POINTS = {
    "inference/evaluate.py",
    "inference/plan.py",
    "inference/serve.py",
    "parallel/explain.py",
    "parallel/schedule_picture.py",
    "train/equivalence.py",
    "train/export.py",
    "train/plan.py",
    "train/sweep.py",
    "train/verify.py",
}
# Parts of entry points: these may read gin files and flags because only entry points import them.
ENTRY_PARTS = {
    "inference/task_cli.py",
    "train/cli.py",
    "train/experiment.py",
    "train/gin_files.py",
    "train/listing.py",
    "train/planning.py",
    "train/searching.py",
    "train/sweeping/arms.py",
    "train/work.py",
}
COMMAND_LINE = {
    "absl.app",
    "absl.flags",
    "argparse",
    "click",
    "fire",
    "getopt",
    "gin",
    "optparse",
    "typer",
    "tyro",
}
TORCH = {"torch", "torchvision", "transformers", "accelerate"}
MESH_AXES = {"stage", "data", "fsdp", "context", "tensor"}
MAX_LINES = 400
SHARED_RUN = 6

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_REQUIREMENTS = itertools.chain(_PROJECT["dependencies"], *_PROJECT["optional-dependencies"].values())
_IMPORTED_AS = {"gin_config": "gin", "orbax_checkpoint": "orbax", "scikit_learn": "sklearn"}
DECLARED = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in _REQUIREMENTS}
DECLARED = {_IMPORTED_AS.get(name, name) for name in DECLARED} - {"torch", "transformers"}


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the repository's root, and its text."""

    path: PurePosixPath
    text: str

    @property
    def package(self) -> str:
        return self.path.parts[0]

    @property
    def is_entry(self) -> bool:
        return self.path.name == "__main__.py" or str(self.path) in ENTRY_POINTS | ENTRY_PARTS

    @property
    def module(self) -> tuple[str, ...]:
        """The dotted name's parts; a package's __init__.py is the package."""
        parts = self.path.with_suffix("").parts
        return parts[:-1] if parts[-1] == "__init__" else parts

    @property
    def tree(self) -> ast.Module:
        return _parse(self)

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 0)}: {what}"


@functools.cache
def _parse(source: Source) -> ast.Module:
    return ast.parse(source.text, str(source.path))


def _read(*folders: str) -> list[Source]:
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return [
        Source(PurePosixPath(f.relative_to(ROOT).as_posix()), f.read_text(encoding="utf-8")) for f in files
    ]


LIBRARY = _read(*MAY_IMPORT)
TESTS = _read("tests")
EVERYTHING = [*LIBRARY, *TESTS, *_read("benchmarks")]


def _imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every module a file imports, wherever in the file: (node, dotted name); `from a import b` gives a.b."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = source.path.parent.parts
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((node, ".".join((*base, alias.name))) for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in {"import_module", "__import__"} and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node, argument.value


def _name(node: ast.AST) -> str:
    """The last part of a name or attribute: `x` of a.b.x."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _within(module: str, families: Iterable[str]) -> bool:
    return any(module == family or module.startswith(family + ".") for family in families)


# --- rules on one source file


def imports_run_one_way(source: Source) -> list[str]:
    forbidden = OURS - MAY_IMPORT[source.package] - {source.package}
    return [
        source.at(node, f"{source.package} imports {module}")
        for node, module in _imports(source)
        if _within(module, forbidden)
    ]


def only_architectures_know_architectures(source: Source) -> list[str]:
    if source.package == "modelzoo":
        return []
    families = {f"modelzoo.{s.path.parts[1]}" for s in LIBRARY if s.path.match("modelzoo/*/model.py")}
    return [
        source.at(node, f"{source.package} imports the architecture {module}")
        for node, module in _imports(source)
        if _within(module, families)
    ]


def only_entry_points_read_gin_or_flags(source: Source) -> list[str]:
    if source.is_entry:
        return []
    found = [
        source.at(node, f"imports {module}: only entry points read gin files and flags")
        for node, module in _imports(source)
        if _within(module, COMMAND_LINE)
    ]
    return found + [
        source.at(node, "reads sys.argv: only entry points read flags")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr == "argv" and _name(node.value) == "sys"
    ]


def library_imports_no_entry_point(source: Source) -> list[str]:
    if source.is_entry:
        return []
    modules = {file.removesuffix(".py").replace("/", ".") for file in ENTRY_POINTS | ENTRY_PARTS}
    modules |= {f"{package}.__main__" for package in MAY_IMPORT}
    return [
        source.at(node, f"imports the entry point {module}")
        for node, module in _imports(source)
        if _within(module, modules)
    ]


def entry_points_are_listed(source: Source) -> list[str]:
    if source.path.name == "__main__.py":
        return []
    guards = [
        node
        for node in source.tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test).replace('"', "'") == "__name__ == '__main__'"
    ]
    listed = str(source.path) in ENTRY_POINTS
    if guards and not listed:
        return [source.at(guards[0], "runs with `python -m` and is not in ENTRY_POINTS of test_house.py")]
    if listed and not guards:
        return [f"{source.path}: is in ENTRY_POINTS of test_house.py and does nothing under `python -m`"]
    return []


def torch_is_never_imported(source: Source) -> list[str]:
    return [
        source.at(node, f"imports {module}; torch is never needed to run")
        for node, module in _imports(source)
        if _within(module, TORCH)
    ]


def mesh_axes_are_spelled_in_parallel_only(source: Source) -> list[str]:
    """A model never needs one of these words; elsewhere they are mesh axes where a sharding is made."""
    if source.package == "parallel":
        return []
    places = [source.tree] if source.package == "modelzoo" else _shardings(source)
    leaves = {leaf for place in places for leaf in ast.walk(place) if isinstance(leaf, ast.Constant)}
    return [
        source.at(leaf, f"spells the mesh axis {leaf.value!r}: use a logical axis")
        for leaf in leaves
        if leaf.value in MESH_AXES
    ]


def _shardings(source: Source) -> list[ast.AST]:
    makers = {"Mesh", "NamedSharding", "P", "PartitionSpec"}
    return [
        node for node in ast.walk(source.tree) if isinstance(node, ast.Call) and _name(node.func) in makers
    ]


def imports_are_declared(source: Source) -> list[str]:
    """What comes in with another package may leave with it."""
    known = OURS | DECLARED | set(sys.stdlib_module_names)
    return [
        source.at(node, f"imports {module}, which pyproject.toml does not name")
        for node, module in _imports(source)
        if module.partition(".")[0] not in known
    ]


def files_are_short(source: Source) -> list[str]:
    lines = len(source.text.splitlines())
    return [f"{source.path}: {lines} lines: has it two owners?"] if lines > MAX_LINES else []


def every_test_asserts(source: Source) -> list[str]:
    checkers = ("assert", "check", "expect", "fail", "raises", "warns")

    def asserts(node: ast.AST) -> bool:
        called = _name(node.func) if isinstance(node, ast.Call) else ""
        return isinstance(node, ast.Assert) or called.startswith(checkers)

    return [
        source.at(node, f"{node.name} asserts nothing")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not any(map(asserts, ast.walk(node)))
    ]


# --- rules on all source files together


def no_function_has_a_module_name(sources: list[Source]) -> list[str]:
    """`package.name` must be one thing: a function of that name would hide the module, or be hidden by it."""
    modules = {source.module for source in sources}
    found = []
    for source in sources:
        package = source.path.parent.parts
        names: list[tuple[ast.AST, str]] = []
        for node in source.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append((node, node.name))
            elif isinstance(node, ast.ImportFrom) and source.path.name == "__init__.py":
                is_the_module = not node.module or tuple(node.module.split(".")) == package
                names += [(node, alias.asname or alias.name) for alias in node.names if not is_the_module]
        found += [
            source.at(node, f"{name} is also the module {'.'.join((*package, name))}")
            for node, name in names
            if (*package, name) in modules
        ]
    return found


def every_source_has_a_test(sources: list[Source], tests: list[Source]) -> list[str]:
    written = {test.path.stem for test in tests if "def test_" in test.text}
    architectures = {source.path.parent for source in sources if source.path.match("modelzoo/*/model.py")}
    subjects = {_subject(source): source for source in sources if source.path.name != "__init__.py"}
    owners: dict[str, list[tuple[str, ...]]] = {}
    for subject in subjects:
        for i in range(len(subject)):
            owners.setdefault("_".join(("test", *subject[i:])), []).append(subject)

    found = []
    for subject, source in subjects.items():
        folder = source.path.parent
        if folder in architectures and f"test_{folder.name}" in written:
            continue
        mine = [
            name
            for name, claimants in owners.items()
            if subject in claimants and all(c == subject or len(c) > len(subject) for c in claimants)
        ]
        if not written.intersection(mine):
            found.append(f"{source.path}: no tests in {' or '.join(f'{name}.py' for name in mine)}")
    return found


def architectures_repeat_nothing(sources: list[Source]) -> list[str]:
    """No two families share a run of six lines, blank ones aside: what they have in common has a home of its own."""
    families = {source.path.parent for source in sources if source.path.match("modelzoo/*/model.py")}
    runs: dict[tuple[str, ...], Source] = {}
    found = []
    for source in sources:
        if source.path.parent not in families | {PurePosixPath("modelzoo")}:
            continue
        lines = [line.strip() for line in source.text.splitlines() if line.strip()]
        for i in range(len(lines) - SHARED_RUN + 1):
            run = tuple(lines[i : i + SHARED_RUN])
            first = runs.setdefault(run, source)
            if first.path.parent != source.path.parent:
                found.append(
                    f"{source.path} repeats {first.path}: {run[0]!r} and the next {SHARED_RUN - 1} lines"
                )
    return found


def _subject(source: Source) -> tuple[str, ...]:
    """What a test file is named after: the path's parts, with __main__ as main."""
    return tuple(part.strip("_") for part in source.module)

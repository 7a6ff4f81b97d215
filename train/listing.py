"""`python -m train --list`: what gin can set: name, type, default, value and the line that gives it, where it is used.

Nothing is built: a file whose required settings are still missing is listed too.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gin

from train.gin_names import Name, parameter_texts, show_type

if TYPE_CHECKING:
    from train.gin_files import Settings

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("setting", "type", "default", "value", "set in", "used in")
_MOST_FILES = 3
"""How many files are named that use a setting."""
_WIDEST = 40
"""Where aligned lines give up aligning."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        name: "name.parameter".
        type: as a user reads it.
        default: as gin would read it, or "required".
        value: what the files make it; empty where nothing sets it.
        where: file and line of that, or the preset.
        used: the files that read it, or the function that takes it.
        text: what it is.
    """

    name: str
    type: str
    default: str
    value: str
    where: str
    used: str
    text: str


def rows(settings: "Settings", wanted: Sequence[str] = ()) -> list[Row]:
    """Every setting, or those whose names hold one of some texts.

    Args:
        settings: what gin files and flags bind.
        wanted: such as "GPTJ" or "learning_rate"; case does not matter.

    Raises:
        ValueError: no setting's name holds one of them.
    """
    preset, values = _preset(settings)
    found = []
    for name, entry in settings.names.items():
        texts = parameter_texts(entry.target)
        for parameter, default in entry.defaults.items():
            key, value, where = f"{name}.{parameter}", "", ""
            if key in settings.bindings:
                value, where = _shown(settings.value(key)), settings.bindings[key].where
            elif name == preset and values[parameter] != default:
                value, where = repr(values[parameter]), f"preset {settings.value('train.preset')}"
            kind = re.sub(r"Callable\[.*\]", "Callable", show_type(entry.types.get(parameter, Any)))
            text = texts.get(parameter, "")
            found.append(Row(key, kind, _shown(default), value, where, used_in(entry, parameter), text))
    for text in wanted:
        if not any(text.lower() in row.name.lower() for row in found):
            raise ValueError(
                f"no setting is called {text}: the names are {', '.join(settings.names)}; "
                "python -m train --list lists all"
            )
    return [row for row in found if not wanted or any(text.lower() in row.name.lower() for text in wanted)]


def _shown(value: Any) -> str:
    missing = value is inspect.Parameter.empty or value is gin.REQUIRED
    return "required" if missing else repr(value)


def _preset(settings: "Settings") -> tuple[str | None, Mapping[str, Any]]:
    """The gin name of the family that train.preset is of, with the preset's fields."""
    from modelzoo.registry import FAMILIES

    preset = settings.value("train.preset")
    for family in FAMILIES.values():
        if preset in family.presets:
            return family.prefix, vars(family.presets[preset])
    return None, {}


def used_in(entry: Name, parameter: str) -> str:
    """Where a setting acts: a function's own file and name; of a dataclass's field, the files that read it."""
    if not inspect.isclass(entry.target):
        return f"{_relative(inspect.getsourcefile(entry.target) or '')}: {entry.target.__name__}"
    home = Path(inspect.getsourcefile(entry.target) or "")
    reads = re.compile(rf"\.{parameter}\b(?!\()")
    others = [file for file, text in _sources(home) if file != home and reads.search(text)]
    files = others or [home]
    more = f" and {len(files) - _MOST_FILES} more" if len(files) > _MOST_FILES else ""
    return ", ".join(map(_relative, files[:_MOST_FILES])) + more


@cache
def _sources(home: Path) -> list[tuple[Path, str]]:
    """The files that may read a dataclass of the file `home`, with their texts: those beside it, and what they import.

    What they import of their own package, that is: of a model, the layers and heads that it is made of.
    """
    package = home.relative_to(ROOT).parts[0]
    found, waiting = dict[Path, str](), sorted(home.parent.glob("*.py"))
    while waiting:
        file = waiting.pop(0)
        if file in found or not file.is_file():
            continue
        found[file] = file.read_text(encoding="utf-8")
        for module, names in re.findall(rf"from ({package}[\w.]*) import ([^\n(]+|\([^)]*\))", found[file]):
            base = ROOT.joinpath(*module.split("."))
            waiting += [base.with_suffix(".py"), *(base / f"{name}.py" for name in re.findall(r"\w+", names))]
    return list(found.items())


def _relative(file: Path | str) -> str:
    path = Path(file)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def show(found: Sequence[Row], with_texts: bool) -> None:
    """Prints a table on a terminal, else aligned lines of which each is one setting.

    Args:
        found: what to show.
        with_texts: say what each setting is, too.
    """
    if sys.stdout.isatty():
        _show_table(found, with_texts)
        return
    for line in lines(found, with_texts):
        sys.stdout.write(line + "\n")


def lines(found: Sequence[Row], with_texts: bool) -> Iterator[str]:
    """The table as text, however wide."""
    cells = [COLUMNS, *(_cells(row) for row in found)]
    widths = [min(_WIDEST, max(len(row[i]) for row in cells)) for i in range(len(COLUMNS))]
    texts = ["what it is", *(row.text for row in found)]
    for row, text in zip(cells, texts, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"{line}  {text if with_texts else ''}".rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    return (row.name, row.type, row.default, row.value, row.where, row.used)


def _show_table(found: Sequence[Row], with_texts: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (*COLUMNS, *["what it is"] * with_texts):
        table.add_column(column, overflow="fold")
    last = ""
    for row in found:
        name = row.name.partition(".")[0]
        if last and name != last:
            table.add_section()
        last = name
        cells = (*_cells(row), *[row.text] * with_texts)
        # A text, so that what looks like rich's markup, as in list[int], is shown as it is.
        table.add_row(*map(Text, cells), style="bold" if row.value else "")
    Console().print(table)

"""Reads gin files strictly: what is unknown, missing or of a wrong type is an error that names the line.

Only entry points use this module; nothing else in flaxtron knows gin. gin-config's own parser, macros and
references do the work (https://github.com/google/gin-config). What is added: every binding remembers where it
was made, its value is checked against the annotation of the parameter it sets, and all of that happens before
the program does anything else.

Departures from plain gin: `include` also looks beside the including file; references are written with
parentheses, as in `train.optimizer = @adamw()`; `import` statements and scopes are refused.
"""

import dataclasses
import difflib
import inspect
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config, config_parser

from train.gin_names import Name, fits, gives, show_type

_MODULE = "flaxtron"
"""gin keeps each name under a module; ours is left out everywhere a user looks."""


@dataclasses.dataclass(frozen=True)
class Binding:
    """One value and where it was given: "configs/quickstart.gin:12", or a flag."""

    value: Any
    where: str


class Settings:
    """What gin files and flags bind.

    Args:
        names: everything that may be set.
        gin_files: read in order; a later binding wins.
        gin_params: "name.parameter=value" each; they win over the files.
        search: folders in which files are looked for, beside the working folder and the including file's.
        linked: {parameter: "name.parameter"}: a parameter so called takes that setting's value unless bound.
        complete: whether what a file requires has to be given.

    Raises:
        ValueError: an unknown name or parameter, a value of the wrong type, a macro without a value, or a
            line that gin cannot read; binding, file and line are named.
        OSError: a file is not there.
    """

    def __init__(
        self,
        names: Mapping[str, Name],
        gin_files: Sequence[str] = (),
        gin_params: Sequence[str] = (),
        search: Sequence[Path] = (),
        linked: Mapping[str, str] | None = None,
        complete: bool = True,
    ):
        self.names, self._search = dict(names), list(search)
        self.bindings: dict[str, Binding] = {}
        self.linked: set[str] = set()
        self._macros: dict[str, Binding] = {}
        self._install()  # the parser looks names up
        for file in gin_files:
            self._read_file(str(file), [], "--gin_file")
        for param in gin_params:
            self._read_param(param)
        for parameter, source in (linked or {}).items():
            self._link(parameter, source)
        self._complete = complete
        for key, binding in self.bindings.items():
            self._check(key, binding)

    def bound(self, name: str) -> dict[str, Any]:
        """The parameters of `name` that something binds, references called."""
        self._install()
        return gin.get_bindings(f"{_MODULE}.{name}")

    def value(self, key: str) -> Any:
        """The value that "name.parameter" has: bound or default, references as written."""
        if key in self.bindings:
            return self._plain(self.bindings[key].value, self.bindings[key].where)
        name, parameter = key.split(".")
        return self.names[name].defaults[parameter]

    def where(self, key: str) -> str:
        """ " (file:line)" of a binding, for messages; empty for a default."""
        return f" ({self.bindings[key].where})" if key in self.bindings else ""

    def located(self, error: ValueError) -> ValueError:
        """The error with the file and line of the setting that its first words name, if one is."""
        message = str(error).splitlines()[0]
        key = re.sub(r"^(\w+?)(?:Config)?\.(\w+) = .*", r"\1.\2", message)
        return ValueError(message + self.where(key))

    def require(self, name: str, where: str = "") -> None:
        """Checks that parameters of `name` without a default are bound, and those of all it refers to.

        Raises:
            ValueError: one is not.
        """
        for parameter, default in self.names[name].defaults.items():
            key = f"{name}.{parameter}"
            if key not in self.bindings and default is inspect.Parameter.empty:
                needed = f", needed by {where}" if where else ""
                raise ValueError(
                    f'{key} is not set{needed}: add it to the gin file or pass --gin_param="{key}=..."'
                )
        for reference, place in self._references(name):
            self.require(reference, place)

    def used(self, names: Sequence[str]) -> list[str]:
        """These names and all that their bindings refer to, in order."""
        seen = list(names)
        for name in seen:
            seen.extend(reference for reference, _ in self._references(name) if reference not in seen)
        return seen

    def flat(
        self, names: Sequence[str], known: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, str]:
        """Every setting of some names as gin text.

        Args:
            names: which; what they refer to is added.
            known: {name: {parameter: value}} of defaults that are not in a signature, as those of a preset.

        Returns:
            {"name.parameter": value as gin would read it}.
        """
        flat = {}
        for name in self.used(names):
            for parameter in self.names[name].defaults:
                key, better = f"{name}.{parameter}", (known or {}).get(name, {})
                default = parameter in better and key not in self.bindings
                flat[key] = repr(better[parameter] if default else self.value(key))
        return flat

    # Reading.

    def _read_file(self, file: str, parents: list[Path], where: str) -> None:
        folders = [Path(), *([parents[-1].parent] if parents else []), *self._search]
        found = next((path for folder in folders if (path := folder / file).is_file()), None)
        if found is None:
            looked = ", ".join(str(folder) for folder in folders)
            raise FileNotFoundError(f"{file}: no such gin file ({where}); looked in {looked}")
        if found.resolve() in [parent.resolve() for parent in parents]:
            raise ValueError(f"{file} includes itself ({where})")
        shown = os.path.relpath(found)
        shown = str(found) if shown.startswith("..") else shown
        with found.open(encoding="utf-8") as text:
            self._read(text, lambda line: f"{shown}:{line}", [*parents, found])

    def _read_param(self, param: str) -> None:
        key, equals, value = param.partition("=")
        where = f'--gin_param="{param}"'
        if not equals:
            raise ValueError(f'{where}: write it as --gin_param="name.parameter=value"')
        try:
            self._read(param, lambda _: where, [])
        except ValueError as error:
            if "cannot be read" in str(error) and value.strip()[:1].isalpha():
                hint = (
                    f"if {value.strip()} is a text, quote it: --gin_param=\"{key.strip()}='{value.strip()}'\""
                )
                raise ValueError(f"{error}; {hint}") from None
            raise

    def _read(self, text: Any, where: Callable[[int], str], parents: list[Path]) -> None:
        for statement, line in _statements(text, _Delegate(self.names), where):
            match statement:
                case config_parser.BindingStatement():
                    self._bind(statement, where(line))
                case config_parser.IncludeStatement():
                    self._read_file(statement.filename, parents, where(line))
                case config_parser.BlockDeclaration():
                    _known(statement.selector, self.names, where(line))
                case _:
                    raise ValueError(f"import ({where(line)}): gin files of flaxtron do not import modules")

    def _bind(self, statement: config_parser.BindingStatement, where: str) -> None:
        binding = Binding(statement.value, where)
        if statement.scope:
            key = f"{statement.scope}/{statement.selector}.{statement.arg_name}"
            raise ValueError(
                f"{key} ({where}): scopes are not used here; name the setting without {statement.scope}/"
            )
        if not statement.arg_name:
            self._macros[statement.selector] = binding
            return
        name, parameter = statement.selector, statement.arg_name
        _known(name, self.names, where)
        if parameter not in self.names[name].defaults:
            known = list(self.names[name].defaults)
            raise ValueError(
                f"unknown setting {name}.{parameter} ({where}): {_meant(parameter, known)}{name} has "
                f"{', '.join(known)}"
            )
        self.bindings[f"{name}.{parameter}"] = binding

    def _link(self, parameter: str, source: str) -> None:
        for name, entry in self.names.items():
            key = f"{name}.{parameter}"
            if (
                key != source
                and parameter in entry.defaults
                and key not in self.bindings
                and source in self.bindings
            ):
                self.bindings[key] = self.bindings[source]
                self.linked.add(key)

    def _install(self) -> None:
        """Makes these names and bindings those that gin, which knows one set of them, has in force."""
        gin.clear_config()
        with config.interactive_mode():  # a name may have stood for something else
            for name, entry in self.names.items():
                gin.register(name, module=_MODULE)(entry.target)
        for macro, binding in self._macros.items():
            gin.bind_parameter((macro, "gin.macro", "value"), binding.value)
        for key, binding in self.bindings.items():
            name, parameter = key.split(".")
            gin.bind_parameter(("", f"{_MODULE}.{name}", parameter), binding.value)

    # Checking.

    def _check(self, key: str, binding: Binding) -> None:
        name, parameter = key.split(".")
        value, hint = self._plain(binding.value, binding.where), self.names[name].types.get(parameter, Any)
        if value is gin.REQUIRED:
            if not self._complete:
                return
            raise ValueError(f'{key} is required ({binding.where}): set it, or pass --gin_param="{key}=..."')
        if not self._fits(value, hint):
            kind = f"{value!r}" if isinstance(value, config.ConfigurableReference) else type(value).__name__
            if isinstance(value, config.ConfigurableReference) and not value.evaluate:
                raise ValueError(
                    f"{key} = {value!r} ({binding.where}): write it with parentheses, {value!r}()"
                )
            raise ValueError(
                f"{key} = {value!r} ({binding.where}): {kind} does not fit; it takes {show_type(hint)}"
            )

    def _fits(self, value: Any, hint: Any) -> bool:
        if isinstance(value, config.ConfigurableReference):
            result = self.names[value.selector.removeprefix(f"{_MODULE}.")].result
            return value.evaluate and gives(result, hint)
        return fits(value, hint)

    def _plain(self, value: Any, where: str) -> Any:
        """The value with its macros and constants replaced by what they stand for."""
        match value:
            case list() | tuple():
                return type(value)(self._plain(item, where) for item in value)
            case dict():
                return {key: self._plain(item, where) for key, item in value.items()}
            case config.ConfigurableReference(selector="gin.constant"):
                return value.scoped_configurable_fn()
            case config.ConfigurableReference(selector="gin.macro"):
                macro = "/".join(value.scopes)
                if macro not in self._macros:
                    raise ValueError(f"%{macro} ({where}): no line gives {macro} a value")
                return self._plain(self._macros[macro].value, self._macros[macro].where)
        return value

    def _references(self, name: str) -> Iterator[tuple[str, str]]:
        for key, binding in self.bindings.items():
            if key.startswith(f"{name}."):
                for reference in config.iterate_references({key: self._plain(binding.value, binding.where)}):
                    yield (
                        reference.selector.removeprefix(f"{_MODULE}."),
                        f"{key} = {reference!r} ({binding.where})",
                    )


def parse_values(text: str, names: Mapping[str, Name]) -> tuple[str, list[str]]:
    """Reads "name.parameter=value,value,...", each value as gin would read it: commas within one do not part it.

    Args:
        text: such as "adamw.b1=0.9,0.95" or "train.tune=('.*bias',),('.*scale', '.*bias')".
        names: everything that may be referred to.

    Returns:
        "name.parameter", and each value as gin text. Whether the one takes the others is not checked.

    Raises:
        ValueError: gin cannot read it, or no value is given.
    """
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise ValueError(f'"{text}": write it as "name.parameter=value,value"')
    Settings(names)  # the parser looks names up
    quote = f"texts are quoted, as \"{key}='one','two'\"" if values[0].isalpha() else "texts are quoted"
    try:
        found = [
            statement for statement, _ in _statements(f"{key} = [{values}]", _Delegate(names), lambda _: text)
        ]
    except ValueError as error:
        raise ValueError(f"{error} ({quote})" if "cannot be read" in str(error) else str(error)) from None
    if len(found) != 1 or not isinstance(found[0], config_parser.BindingStatement) or found[0].scope:
        raise ValueError(f'"{text}": write it as "name.parameter=value,value"')
    return f"{found[0].selector}.{found[0].arg_name}", [repr(value) for value in found[0].value]


class _Reference(config.ConfigurableReference):
    """gin's own, shown the way it was written."""

    def __repr__(self) -> str:
        return f"@{self.selector.removeprefix(f'{_MODULE}.')}" + "()" * self.evaluate


class _UnknownReference(Exception):
    def __init__(self, name: str):
        self.name = name


class _Delegate(config.ParserDelegate):
    def __init__(self, names: Mapping[str, Name]):
        super().__init__()
        self.names = names

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        if scoped_selector not in self.names:
            raise _UnknownReference(scoped_selector)
        return _Reference(f"{_MODULE}.{scoped_selector}", evaluate)


def _statements(text: Any, delegate: _Delegate, where: Callable[[int], str]) -> Iterator[tuple[Any, int]]:
    """gin's statements with their lines; whatever its parser raises becomes one line that says where."""
    parser = None
    try:
        parser = config_parser.ConfigParser(text, delegate)
        while (statement := parser.parse_statement()) is not None:
            yield statement, statement.location.line_num
        return
    except SyntaxError as error:
        line, reason = error.lineno, str(error.msg).partition("\n")[0].partition(" on line")[0]
    except tokenize.TokenError as error:
        line, reason = error.args[1][0], str(error.args[0])
    except _UnknownReference as error:
        assert parser is not None
        assert parser.current_token is not None
        _known(error.name, delegate.names, where(parser.current_token.start[0]))
        raise
    raise ValueError(f"{where(line or 1)}: cannot be read: {reason}")


def _known(name: str, names: Mapping[str, Name], where: str) -> None:
    if name not in names:
        raise ValueError(
            f"unknown name {name} ({where}): {_meant(name, list(names))}the names are "
            f"{', '.join(sorted(names))}"
        )


def _meant(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {close[0]}? " if close else ""

"""What gin can set, without gin: parameters, their types, defaults and descriptions; which values fit a type."""

import collections.abc
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import typeguard


@dataclasses.dataclass(frozen=True)
class Name:
    """Something that gin can set.

    Attributes:
        target: the function or dataclass whose parameters are set.
        hidden: parameters that the program supplies and gin may not.
        hints: types of parameters, where the annotations do not say.
    """

    target: Callable[..., Any]
    hidden: frozenset[str] = frozenset()
    hints: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """Parameters that gin may set, with their defaults; `inspect.Parameter.empty` where there is none."""
        named = {p.name: p for p in inspect.signature(self.target).parameters.values()}
        made = {f.name: f.default_factory for f in _fields(self.target)}
        found = {
            n: made[n]() if n in made else p.default
            for n, p in named.items()
            if p.kind is not p.VAR_KEYWORD and n not in self.hidden
        }
        return found | {n: None for n in self.hints if n not in found}

    @functools.cached_property
    def types(self) -> dict[str, Any]:
        """The type of each of these parameters."""
        return {**typing.get_type_hints(self.target), **self.hints}

    @property
    def result(self) -> Any:
        """The type of what a call gives."""
        return self.target if inspect.isclass(self.target) else self.types.get("return", Any)


def describe(name: str, entry: Name) -> list[str]:
    """What gin can set under a name: a line for each parameter with its type, default and description."""
    texts = parameter_texts(entry.target)
    lines = []
    for parameter, default in entry.defaults.items():
        given = "required" if default is inspect.Parameter.empty else f"default {default!r}"
        kind = show_type(entry.types.get(parameter, Any))
        lines.append(f"{name}.{parameter} ({kind}; {given}): {texts.get(parameter, '')}".rstrip(": "))
    return lines


def parameter_texts(target: Any) -> dict[str, str]:
    """{parameter: description} of a docstring's Args or Attributes; a class has those of its bases too."""
    texts: dict[str, str] = {}
    for base in reversed(target.__mro__) if inspect.isclass(target) else (target,):
        texts |= _texts_of(base.__doc__ or "")
    return texts


def _texts_of(doc: str) -> dict[str, str]:
    block = re.search(r"(?:Args|Attributes):\n(.*?)(?:\n\s*\n|\Z)", inspect.cleandoc(doc), re.DOTALL)
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in block[1].splitlines() if block else ():
        if found := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = found[1].split(", ")
            texts |= dict.fromkeys(names, found[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def fits(value: Any, hint: Any) -> bool:
    """Whether a literal is of a type. An int is a float; a bool is neither, though Python calls it an int."""
    if isinstance(value, bool) and not any(
        member in (bool, Any) or typing.get_origin(member) is typing.Literal for member in _members(hint)
    ):
        return False
    try:
        typeguard.check_type(
            value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS
        )
    except typeguard.TypeCheckError:
        return False
    return True


def gives(result: Any, hint: Any) -> bool:
    """Whether a call whose result has one type fits a parameter of another."""
    callable_type = collections.abc.Callable
    for wanted in _members(hint):
        if wanted is Any or result == wanted:
            return True
        if inspect.isclass(result) and inspect.isclass(wanted) and issubclass(result, wanted):
            return True
        if typing.get_origin(result) is callable_type and typing.get_origin(wanted) is callable_type:
            return True
    return False


def show_type(hint: Any) -> str:
    """A type as a user reads it."""
    if isinstance(hint, str):
        return hint
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if any(typing.get_origin(member) is typing.Literal for member in _members(hint)):
        return " or ".join(show_type(member).replace("NoneType", "None") for member in _members(hint))
    text = inspect.formatannotation(hint)
    return text.replace("typing.", "").replace("collections.abc.", "").replace("optax._src.base.", "optax.")


def _fields(target: Any) -> list[Any]:
    """The fields of a dataclass whose defaults are made, such as an empty dict."""
    found = dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()
    return [field for field in found if field.default_factory is not dataclasses.MISSING]


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)

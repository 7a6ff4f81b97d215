"""What is compared: every family's configs and inputs, and the list of tests that follows from them.

A family's share is data, in cases_<model_type>.py: a `CASES` of this module's `Cases`. Which families and classes
there are, the registry says; one without cases fails.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from modelzoo import registry


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every one of `classes` with every one of `configs` and of `inputs`.

    Attributes:
        configs: titles of `Cases.configs`.
        inputs: options of tests/parity/inputs.py, joined by " + ".
        classes: names; None is every class of the family.
    """

    configs: tuple[str, ...]
    inputs: tuple[str, ...]
    classes: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Cases:
    """One family's share.

    Attributes:
        configs: title -> keywords of transformers' config.
        grids: whose outputs are compared.
        cached: whose outputs in chunks, through a cache, are compared.
        fixtures: whose outputs tests/fixtures keeps, for `make test`; of tiny configs.
        losses: class -> title of the config, or (title, inputs), of its losses and gradients; by default the class's
            first config, padded on the right.
        options: the family's own options of inputs.
    """

    configs: Mapping[str, Mapping[str, Any]]
    grids: tuple[Grid, ...]
    cached: tuple[Grid, ...] = ()
    fixtures: tuple[Grid, ...] = ()
    losses: Mapping[str, str | tuple[str, str]] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Callable[..., None]] = dataclasses.field(default_factory=dict)


def _module(model_type: str) -> str:
    return f"tests.parity.cases_{model_type.replace('-', '_')}"


WITHOUT_CASES = [name for name in registry.FAMILIES if importlib.util.find_spec(_module(name)) is None]
"""Families that nothing is compared of: there should be none."""
CLASSES = {
    cls.__name__: family
    for family in registry.FAMILIES.values()
    if family.model_type not in WITHOUT_CASES
    for cls in family.classes
}
"""Class -> its family, of the whole zoo."""


@functools.cache
def cases_of(name: str) -> Cases:
    """The cases of a class's family."""
    return importlib.import_module(_module(CLASSES[name].model_type)).CASES


def cells(kind: str, name: str) -> list[tuple[str, str]]:
    """(config, inputs) of a class: `kind` is "grids", "cached" or "fixtures"."""
    found = [
        (config, inputs)
        for grid in getattr(cases_of(name), kind)
        if grid.classes is None or name in grid.classes
        for config in grid.configs
        for inputs in grid.inputs
    ]
    return list(dict.fromkeys(found))


def titles(name: str) -> list[str]:
    """The configs of a class."""
    return list(dict.fromkeys(config for config, _ in cells("grids", name)))


def loss_cell(name: str) -> tuple[str, str | None]:
    """(config, inputs or None for the default) of a class's losses."""
    chosen = cases_of(name).losses.get(name, titles(name)[0])
    return (chosen, None) if isinstance(chosen, str) else chosen


def every_class() -> Any:
    """Parametrises a test by `name`."""
    return pytest.mark.parametrize("name", CLASSES)


def every_config() -> Any:
    """Parametrises a test by `name` and `title`."""
    return pytest.mark.parametrize(
        ("name", "title"), [(name, title) for name in CLASSES for title in titles(name)]
    )


def every_cell(kind: str) -> Any:
    """Parametrises a test by `name`, `title` and `options`."""
    found = [(name, *cell) for name in CLASSES for cell in cells(kind, name)]
    return pytest.mark.parametrize(("name", "title", "options"), found, ids=str)


def exported_titles(name: str) -> list[str]:
    """Configs for another transformers.

    Version 5 dropped relative positions, and its MvpModel hands use_prompt to the wrong argument of its encoder, which
    then has no prompts (5.23). Every version takes a summary other than "cls_index" of the choices: tasks.DoubleHeads.
    """
    found = []
    for title in titles(name):
        fields = cases_of(name).configs[title]
        absolute = fields.get("position_embedding_type", "absolute") == "absolute"
        of_a_token = fields.get("summary_type", "cls_index") == "cls_index"
        if absolute and of_a_token and not fields.get("use_prompt"):
            found.append(title)
    return found

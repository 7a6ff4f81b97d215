"""Which classes a classifier has, and the class of a label: by name, by number, several of them, or a number itself."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from train.tasks.examples import Example

CLASSIFIERS = ("sequence_classification", "token_classification")
"""Tasks of models whose config says how many classes there are."""
MULTI = "multi_label_classification"
SINGLE = "single_label_classification"
REGRESSION = "regression"


def with_classes(
    config: Any,
    task: str,
    examples: Sequence[Example],
    labels: Sequence[str] | None,
    bound: Collection[str] = (),
) -> Any:
    """A model's config with the classes that examples are of.

    Args:
        config: the model's.
        task: `Model.task`.
        examples: to train on.
        labels: names of the classes, or None: then the config's names count, or those in the examples.
        bound: fields of the config that the user set.

    Raises:
        ValueError: labels that cannot be told, or another number of classes than the user set.
    """
    if task not in CLASSIFIERS:
        return config
    family = type(config).__name__.removesuffix("Config")
    kind = None
    if task == "sequence_classification":
        kind = config.problem_type or _kind(examples[0])
        if kind == REGRESSION:
            count = config.num_labels if "num_labels" in bound else 1
            return dataclasses.replace(config, problem_type=kind, num_labels=count, id2label=None)
    names: Sequence[str] | None = labels
    if names is None and config.id2label:
        names = [name for _, name in config.id2label]
    if names is None:
        found = {label for one in examples for label in _labels(one, task, kind)}
        if any(isinstance(label, str) for label in found):
            names = sorted(map(str, found), key=lambda name: (name != "O", name))
    if names is None:
        return dataclasses.replace(config, problem_type=kind or config.problem_type)
    if "num_labels" in bound and config.num_labels != len(names):
        shown = ", ".join(map(repr, names[:8]))
        raise ValueError(
            f"{family}.num_labels = {config.num_labels}: there are {len(names)} classes: {shown}"
        )
    pairs = tuple(enumerate(names))
    return dataclasses.replace(
        config, num_labels=len(names), id2label=pairs, problem_type=kind or config.problem_type
    )


def _kind(example: Example) -> str:
    value = example.value("label")
    if isinstance(value, list):
        return MULTI
    number = as_number(value)
    return REGRESSION if isinstance(number, float) else SINGLE


def as_number(value: Any) -> int | float | str:
    """The number that a text from a .csv is, if it is one."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def _labels(example: Example, task: str, kind: str | None) -> list[Any]:
    if task == "token_classification":
        value = example.value("tags")
        return [as_number(one) for one in (value.split() if isinstance(value, str) else value)]
    value = example.value("label")
    if kind == MULTI:
        return [as_number(one) for one in (value.split("|") if isinstance(value, str) else value)]
    return [as_number(value)]


class Classes:
    """The classes of a model, and which of them a label is.

    Args:
        config: of the model.
    """

    def __init__(self, config: Any):
        self.count = config.num_labels
        self.family = type(config).__name__.removesuffix("Config")
        self.names = dict(config.id2label or ())
        self._numbers = {name: number for number, name in self.names.items()}

    def name(self, number: int) -> str:
        """What a class is called."""
        return self.names.get(number, f"LABEL_{number}")

    def number(self, label: Any, where: str) -> int:
        """The number of a label.

        Args:
            label: a name or a number.
            where: its file and line.

        Raises:
            ValueError: it is of no class.
        """
        if isinstance(label, str) and label in self._numbers:
            return self._numbers[label]
        number = as_number(label)
        if isinstance(number, bool) or not isinstance(number, int):
            known = ", ".join(repr(name) for name in list(self._numbers)[:8]) or f"0 to {self.count - 1}"
            raise ValueError(
                f"{where}: unknown label {label!r}: the classes are {known}; task.labels names them"
            )
        if not 0 <= number < self.count:
            raise ValueError(
                f"{where}: label {number} is outside the {self.count} classes: {self.family}.num_labels sets how many"
            )
        return number

    def sequence(self, example: Example, kind: str | None) -> Any:
        """The label of a sequence as its loss wants it: int, or floats [C]."""
        value = example.value("label")
        if kind == REGRESSION:
            values = value if isinstance(value, list) else [value]
            numbers = [as_number(one) for one in values]
            wrong = [
                one for one in numbers if isinstance(one, (str, bool)) or not isinstance(one, (int, float))
            ]
            if wrong:
                raise ValueError(f"{example.where}: label {wrong[0]!r} is not a number")
            if len(numbers) != self.count:
                raise ValueError(
                    f"{example.where}: label has {len(numbers)} numbers: {self.family}.num_labels = {self.count}"
                )
            return [float(one) for one in numbers]
        if kind == MULTI:
            listed = [one for one in value.split("|") if one] if isinstance(value, str) else value
            if not isinstance(listed, list):
                raise ValueError(f"{example.where}: label is {value!r}: a list of the classes that hold")
            present = {self.number(one, example.where) for one in listed}
            return [float(number in present) for number in range(self.count)]
        return self.number(value, example.where)

    def tags(self, example: Example, count: int) -> list[int]:
        """The labels of `count` words.

        Raises:
            ValueError: there are more or fewer.
        """
        value = example.value("tags")
        listed = value.split() if isinstance(value, str) else value
        if not isinstance(listed, list) or len(listed) != count:
            have = len(listed) if isinstance(listed, list) else repr(value)
            raise ValueError(f"{example.where}: {count} tokens and {have} tags: each token has one")
        return [self.number(one, example.where) for one in listed]

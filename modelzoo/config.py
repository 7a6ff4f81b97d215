"""What every model config has in common: reading and writing transformers' config.json."""

import dataclasses
import functools
import numbers
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast, get_args, get_origin, get_type_hints

from modelzoo.layers.mlp import GATED

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields that all families share, named as in transformers.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id: special tokens, None where the family has none.
        num_labels: C, number of classes of a classification head.
        problem_type: one of PROBLEM_TYPES, or None: inferred from num_labels and the labels.
        id2label: names of the classes as (id, name) pairs; a dict is taken too.
    """

    model_type: ClassVar[str]
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spellings of fields in a config.json; where one stands in a file, it is what transformers goes by."""

    absent_when_none: ClassVar[tuple[str, ...]] = ("problem_type",)
    """Fields that transformers does not write into a config.json unless they are set."""

    additions: ClassVar[tuple[str, ...]] = ()
    """Fields that, set, add parameters which training can make new to a checkpoint without them."""

    knobs: ClassVar[tuple[str, ...]] = ()
    """Fields that no Hugging Face file knows (`modelzoo.knobs`); a family need not have all."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    num_labels: int = 2
    problem_type: str | None = None
    id2label: tuple[tuple[int, str], ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.id2label, Mapping):
            # A tuple, so that a config can be hashed: modules are static arguments of jit.
            pairs = tuple(sorted((int(i), str(label)) for i, label in self.id2label.items()))
            object.__setattr__(self, "id2label", pairs)
        for field, kind in _field_types(type(self)).items():
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            why = f"choose from {choices}" if choices else f"it is of type {getattr(kind, '__name__', kind)}"
            self._check(_is_of(getattr(self, field), kind), field, why)
        self._check(
            self.problem_type is None or self.problem_type in PROBLEM_TYPES,
            "problem_type",
            f"choose from {PROBLEM_TYPES}",
        )
        self._check(self.num_labels >= 1, "num_labels", "it is the number of classes")
        names = self.id2label or ()
        self._check(len(names) in (0, self.num_labels), "num_labels", f"id2label names {len(names)} classes")

    @property
    def knobs_on(self) -> dict[str, Any]:
        """What makes this a model that transformers has no class for: fields and values."""
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in self.knobs and getattr(self, field.name) != field.default
        }
        for field in ("activation_function", "hidden_act"):
            if (value := getattr(self, field, None)) in GATED:
                found[field] = value
        return found

    def _check_sizes(self, *fields: str) -> None:
        for field in fields:
            self._check(getattr(self, field) >= 1, field, "it is a size, at least 1")

    def _check_probabilities(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            self._check(value is None or 0.0 <= value < 1.0, field, "a dropout probability lies in [0, 1)")

    def _check(self, holds: bool, field: str, why: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}.{field} = {getattr(self, field)!r}: {why}")

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> Self:
        """Builds the config from the contents of a config.json; keys that no field takes are left out.

        Raises:
            ValueError: the file is of another model_type, or a value does not fit.
        """
        model_type = hf_config.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"model_type {model_type!r} is not {cls.model_type!r}, the type {cls.__name__} reads"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in hf_config.items() if name in known}
        for alias, name in cls.aliases.items():
            if hf_config.get(alias) is not None:
                values[name] = hf_config[alias]
        if labels := values.pop("id2label", None):
            # The names decide where a file holds another num_labels, as in transformers; LABEL_0, ... are no names.
            values["num_labels"] = len(labels)
            if {str(i): label for i, label in labels.items()} != _numbered_labels(len(labels)):
                values["id2label"] = labels
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that transformers reads back into the same config, if no knob is on."""
        values: dict[str, Any] = {"model_type": self.model_type}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in self.knobs and value == field.default:
                continue
            values[field.name] = list(value) if isinstance(value, tuple) else value
        # transformers derives num_labels from the names and refuses the two together in a file.
        num_labels = values.pop("num_labels")
        labels = {str(i): label for i, label in self.id2label or ()} or _numbered_labels(num_labels)
        values["id2label"] = labels
        values["label2id"] = {label: int(i) for i, label in labels.items()}
        for name in self.absent_when_none:
            if values[name] is None:
                del values[name]
        return values

    # The names that code outside a family uses, whatever the family calls them: here by its aliases.
    def _aliased(self, name: str) -> Any:
        if name not in self.aliases:
            raise NotImplementedError(
                f"{type(self).__name__} neither calls a field {name} nor says what it is"
            )
        return getattr(self, self.aliases[name])

    @property
    def num_layers(self) -> int:
        """L, blocks of the (decoder) trunk."""
        return self._aliased("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        """D."""
        return self._aliased("hidden_size")

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the positions allow, or None where there is no limit."""
        return self._aliased("max_position_embeddings")

    @property
    def initializer_std(self) -> float:
        """Standard deviation of kernels and embeddings at the start: what most families call initializer_range."""
        return cast(Any, self).initializer_range

    @property
    def residual_std(self) -> float:
        """The same of the kernels that write to the residual: the layers' `out` and `fc_out`."""
        return self.initializer_std

    @property
    def head_dropout(self) -> float:
        """Probability of dropping an element of what a classification head reads."""
        return 0.0


def _numbered_labels(num_labels: int) -> dict[str, str]:
    """transformers' names of classes that have none."""
    return {str(i): f"LABEL_{i}" for i in range(num_labels)}


@functools.cache
def _field_types(cls: type[ModelConfig]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value from a file or a command line is of a field's type; an int is a float too, a bool is no int."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is types.UnionType:
        return any(_is_of(value, option) for option in get_args(kind))
    wider = {int: numbers.Integral, float: numbers.Real}.get(kind, get_origin(kind) or kind)
    return isinstance(value, wider) and (kind is bool or not isinstance(value, bool))

"""Which families there are. A family's line says where its config, classes and weight table are; it loads when used.

To add one: modelzoo/<model_type>/{config,model,weights}.py, its line in `FAMILIES`, its import for type checkers.
"""

# ruff: noqa: F401, F403

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of every family, for type checkers and editors
    from modelzoo.bloom.config import BloomConfig
    from modelzoo.bloom.model import *
    from modelzoo.config import ModelConfig
    from modelzoo.gpt2.config import GPT2Config
    from modelzoo.gpt2.model import *
    from modelzoo.gptj.config import GPTJConfig
    from modelzoo.gptj.model import *
    from modelzoo.megatron_bert.config import MegatronBertConfig
    from modelzoo.megatron_bert.model import *
    from modelzoo.model import Model
    from modelzoo.mvp.config import MvpConfig
    from modelzoo.mvp.model import *
    from modelzoo.roberta.config import RobertaConfig
    from modelzoo.roberta.model import *
    from modelzoo.weights import WeightTable


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture, in modelzoo/<model_type>/ with _ for -.

    Attributes:
        title: its name in prose.
        paper: where it was published, and the address.
        model_type: transformers' name of it, as in config.json.
        prefix: what its classes' names begin with, as in "GPTJConfig"; gin calls its config so.
    """

    title: str
    paper: tuple[str, str]
    model_type: str
    prefix: str

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"modelzoo.{self.model_type.replace('-', '_')}.{name}")

    @functools.cached_property
    def config_class(self) -> "type[ModelConfig]":
        """Its config."""
        return getattr(self._module("config"), f"{self.prefix}Config")

    @functools.cached_property
    def presets(self) -> "Mapping[str, ModelConfig]":
        """Named configs."""
        return self._module("config").PRESETS

    @functools.cached_property
    def classes(self) -> "tuple[type[Model], ...]":
        """Its model classes; the first is the bare trunk."""
        module = self._module("model")
        return tuple(getattr(module, name) for name in module.__all__)

    @functools.cached_property
    def weights(self) -> "WeightTable":
        """Its table of Hugging Face names."""
        return self._module("weights").WEIGHTS

    def named(self, name: str) -> Any:
        """Its config or class of this name, or None."""
        if not name.startswith(self.prefix):
            return None
        return next((each for each in (self.config_class, *self.classes) if each.__name__ == name), None)


_WANG = ("Wang and Komatsuzaki, 2021", "https://github.com/kingoflolz/mesh-transformer-jax")
FAMILIES = {
    family.model_type: family
    for family in (
        Family("GPT-J", _WANG, "gptj", "GPTJ"),
        Family("BLOOM", ("BigScience, 2022", "https://arxiv.org/abs/2211.05100"), "bloom", "Bloom"),
        Family("RoBERTa", ("Liu et al., 2019", "https://arxiv.org/abs/1907.11692"), "roberta", "Roberta"),
        Family(
            "MegatronBERT",
            ("Shoeybi et al., 2019", "https://arxiv.org/abs/1909.08053"),
            "megatron-bert",
            "MegatronBert",
        ),
        Family("MVP", ("Tang et al., 2022", "https://arxiv.org/abs/2206.12131"), "mvp", "Mvp"),
        Family("GPT-2", ("Radford et al., 2019", "https://github.com/openai/gpt-2"), "gpt2", "GPT2"),
    )
}


def get_family(model_type: str) -> Family:
    """The family that transformers calls `model_type`.

    Raises:
        ValueError: no such family.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"unknown model_type {model_type!r}: flaxtron has {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def family_of(model_class: "type[Model]") -> Family | None:
    """The family that a class is of, if any."""
    return next((family for family in FAMILIES.values() if model_class in family.classes), None)


def relatives(model_class: "type[Model]", tasks: Collection[str]) -> str:
    """For messages, the classes of a class's family that are of some tasks, such as "BloomForCausalLM"."""
    family = family_of(model_class)
    found = [cls.__name__ for cls in family.classes if cls.task in tasks] if family else []
    return " or ".join(found) or "a class of another family"


def find(name: str) -> Any:
    """The config or model class of this name, such as "GPTJConfig", or None."""
    found = (family.named(name) for family in FAMILIES.values())
    return next((each for each in found if each is not None), None)


def get_model_class(name: str) -> "type[Model]":
    """The model class of this name, such as "GPTJForCausalLM".

    Raises:
        ValueError: no such class.
    """
    found = find(name)
    if found is None or name.endswith("Config"):
        known = sorted(cls.__name__ for family in FAMILIES.values() for cls in family.classes)
        raise ValueError(f"unknown model class {name!r}: {_nearest(name, known)}")
    return found


def list_presets() -> list[str]:
    """The names that `get_config` takes."""
    return sorted(name for family in FAMILIES.values() for name in family.presets)


def get_config(name: str, **overrides: Any) -> Any:
    """A preset's config.

    Args:
        name: such as "gpt-j-6b"; `list_presets` lists them.
        overrides: fields to change.

    Raises:
        ValueError: no such preset or field.
    """
    for family in FAMILIES.values():
        if name in family.presets:
            known = {field.name for field in dataclasses.fields(family.config_class)}
            if unknown := sorted(set(overrides) - known):
                raise ValueError(
                    f"{family.config_class.__name__} has no field {unknown[0]!r}: it has {sorted(known)}"
                )
            return dataclasses.replace(family.presets[name], **overrides)
    raise ValueError(f"unknown preset {name!r}: {_nearest(name, list_presets())}")


def _nearest(name: str, known: list[str]) -> str:
    """For messages, the names that one may have meant, and all that there are."""
    close = difflib.get_close_matches(name, known, n=2)
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"flaxtron has {', '.join(known)}"

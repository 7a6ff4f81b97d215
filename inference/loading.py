"""What a command line calls a checkpoint: a training run's folder, one of its steps, or a Hugging Face
model."""

import dataclasses
import json
import math
import os
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

import modelzoo
import parallel
from inference.preparing import prepare
from modelzoo.hf_files import find_folder, is_mistyped
from parallel.checkpoint import as_path

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config has been read and whose arrays have not.

    Attributes:
        folder: where its files lie; a pathlib.Path or the like.
        model: the model that it is of.
        is_run: written by training; else a Hugging Face folder.
        eos_token_id: the ids that its texts end with, or None.
    """

    folder: Any
    model: modelzoo.Model
    is_run: bool
    eos_token_id: tuple[int, ...] | None

    def read_params(self, rules: parallel.Rules | None = None) -> Any:
        """Reads the parameters to where they belong, in the model's param_dtype, each device its own slices.

        Raises:
            OSError, ValueError: a file is missing or damaged, or does not fit the config.
        """
        return self._read(rules)

    def read_prepared(self, rules: parallel.Rules | None = None, quantize: str | None = None) -> Any:
        """Reads the parameters as `prepare` lays them out, with no second copy where the files have one tree per layer.

        Args:
            rules: where they are to lie; None is the first device.
            quantize: "int8" turns the large ones into int8, each as soon as it is read.

        Raises:
            OSError, ValueError: as `read_params`, or an unknown `quantize`.
        """
        if self.is_run:
            return prepare(self.model, self._read(rules), rules, quantize)
        return prepare(self.model, self._read(rules, unstack=True, quantize=quantize), rules)

    def _read(self, rules: parallel.Rules | None, **form: Any) -> Any:
        dtype = self.model.param_dtype
        if self.is_run:
            return parallel.restore_params(self.folder, self.model, rules, dtype)
        dtypes = dict(dtype=self.model.dtype, param_dtype=dtype)
        return modelzoo.from_hf(self.folder, type(self.model), rules=rules, **dtypes, **form)[1]


def rules_of_mesh(text: str) -> parallel.Rules | None:
    """The rules of a mesh, as a command line takes it, such as "tensor=4"; None for an empty text.

    A mesh of fewer devices than there are takes the first of them.

    Raises:
        ValueError: no such mesh axis, or more devices than there are.
    """
    sizes: dict[str, Any] = parallel.parse_mesh(text)
    if not sizes:
        return None
    devices, count = jax.devices(), math.prod(sizes.values())
    if min(sizes.values()) > 0 and count < len(devices):
        devices = devices[:count]
    return parallel.make_rules(parallel.make_mesh(**sizes, devices=devices))


def open_checkpoint(
    path: str | os.PathLike[str],
    dtype: Any,
    tasks: Collection[str] = ("causal_lm",),
    cache: str = "full",
) -> Checkpoint:
    """Finds a checkpoint and reads its config.

    Args:
        path: a run's folder (its newest step is taken), the folder of one step, a Hugging Face folder, or
            a hub id such as "EleutherAI/gpt-j-6b".
        dtype: to compute in and to keep the parameters in.
        tasks: the `Model.task` of models that will do.
        cache: "int8" keeps keys and values of earlier tokens in 8 bits, "full" in `dtype`.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: its config is damaged, or is of a model of another task.
    """
    folder, is_run = find_checkpoint(path)
    content = read_json(folder / CONFIG)
    try:
        model = _model_class(content, tasks)
        config: Any = modelzoo.get_family(content.get("model_type", "")).config_class.from_hf(content)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    eos: Any = content.get("eos_token_id")
    if (folder / "generation_config.json").is_file():
        eos = read_json(folder / "generation_config.json").get("eos_token_id", eos)
    eos = eos if isinstance(eos, list) else [eos]
    # Small models often keep the id of the vocabulary that theirs was cut from, which can never be generated.
    ends = tuple(token for token in eos if token in range(config.vocab_size))
    kept = model(config, dtype, dtype, cache_dtype=jnp.int8 if cache == "int8" else None)
    return Checkpoint(folder, kept, is_run, ends or None)


def find_checkpoint(path: str | os.PathLike[str], with_weights: bool = True) -> tuple[Any, bool]:
    """The folder of a checkpoint, and whether it is a training run's.

    Args:
        path: as of `open_checkpoint`.
        with_weights: False fetches of a hub repository no more than its config and the index of its weights.

    Raises:
        OSError: there is none.
    """
    folder = as_path(path)
    is_run = "://" in str(path) or (folder.is_dir() and not (folder / CONFIG).is_file())
    is_run = is_run or (folder / "params").is_dir()
    if is_run:
        return parallel.latest_checkpoint(path), True
    if folder.is_dir():
        return folder, False
    if is_mistyped(path):
        steps = [step.name for step in folder.parent.glob("*") if step.name.isdigit()]
        there = (
            f"; there are {', '.join(sorted(steps, key=int))}"
            if folder.parent.name == "checkpoints" and steps
            else ""
        )
        raise OSError(f"no checkpoint at {str(path)!r}: there is no such folder{there}")
    # Its errors say that there is neither such a folder nor such a repository.
    return find_folder(str(path), with_weights), False


def _model_class(content: dict[str, Any], tasks: Collection[str]) -> type[modelzoo.Model]:
    named = content.get("architectures") or ["(none)"]
    if named == ["(none)"]:
        raise ValueError("names no architecture, so there is no telling which head it has")
    model = modelzoo.get_model_class(named[0])
    if model.task not in tasks:
        family = modelzoo.get_family(content.get("model_type", "")).classes
        fitting = [cls.__name__ for cls in family if cls.task in tasks]
        does = "continue prompts" if "causal_lm" in tasks else f"do {' or '.join(tasks).replace('_', ' ')}"
        rest = f"a checkpoint of {' or '.join(fitting)} does" if fitting else "no class of its family does"
        from inference.text_tasks import TASKS  # which loads checkpoints itself

        commands = [name for name, kind in TASKS.items() if model.task in kind.tasks]
        commands += ["--prompt"] * (model.task == "causal_lm")
        if commands:
            rest += f"; it is for `python -m inference {commands[0]}`"
        raise ValueError(f"{named[0]} does not {does}: {rest}")
    return model


def read_json(file: Any) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise OSError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content

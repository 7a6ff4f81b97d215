"""Where a run's parameters come from: a Hugging Face checkpoint, or another run, with a head of its own if need be."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import modelzoo
import parallel
from modelzoo import hf_files
from modelzoo import weights as tables
from parallel import checkpoint


@dataclasses.dataclass(frozen=True)
class Start:
    """A checkpoint to start from, of which the config alone has been read.

    Attributes:
        folder: where its files lie.
        is_run: whether training here wrote it.
        content: its config.json.
    """

    folder: Any
    is_run: bool
    content: Mapping[str, Any]

    def config(self, family: str) -> Any:
        """Its config.

        Args:
            family: the model_type that is wanted.

        Raises:
            ValueError: it is of another, or damaged.
        """
        found = self.content.get("model_type", "")
        if found != family:
            raise ValueError(
                f"{self.folder}: a checkpoint of model_type {found!r}, where the model class is one of {family!r}"
            )
        try:
            return modelzoo.get_family(family).config_class.from_hf(self.content)
        except ValueError as error:
            raise ValueError(f"{self.folder / hf_files.CONFIG}: {error}") from None

    def saved_model(self) -> Any:
        """The model that a run saved, without adapters."""
        return modelzoo.get_model_class(self.content["architectures"][0])(
            self.config(self.content.get("model_type", ""))
        )

    def read_params(self, model: modelzoo.Model, rules: parallel.Rules, rng: jax.Array) -> Any:
        """The parameters of a model, float32: the checkpoint's, its adapters merged, and new ones where it has none.

        Args:
            model: of its family.
            rules: of the mesh.
            rng: PRNG key of what is new: a head, adapters, prompts.

        Raises:
            OSError, ValueError: a file is missing or damaged, or does not fit the model's config.
        """
        own = self.config(model.config.model_type)
        if self.is_run:
            found = parallel.restore_params(self.folder, self.saved_model(), rules, jnp.float32)
        else:
            lacks = {name: False for name in own.additions if not getattr(own, name)}
            config = dataclasses.replace(model.config, **lacks)
            dtypes: dict[str, Any] = dict(dtype=model.dtype, param_dtype=jnp.float32, config=config)
            found = modelzoo.from_hf(self.folder, type(model), rules=rules, **dtypes)[1]
        wanted = tables.flatten(parallel.abstract_sharded_params(model, rules))
        known = {path: leaf for path, leaf in tables.flatten(found).items() if path in wanted}
        for path, leaf in known.items():
            if leaf.shape != wanted[path].shape:
                raise ValueError(
                    f"{self.folder}: its {'/'.join(path)} is {list(leaf.shape)}, where the config makes it "
                    f"{list(wanted[path].shape)}"
                )
        return parallel.fill_params(tables.unflatten(known), model, rng, rules)


def open_start(path: str | os.PathLike[str], setting: str = "train.init_from") -> Start:
    """Finds a checkpoint and reads its config.

    Args:
        path: a Hugging Face folder or hub id, a run's folder (its newest step is taken), or that of one step.
        setting: where the path is from, for messages.

    Raises:
        OSError: there is none.
        ValueError: its config is damaged.
    """
    place = Path(path).expanduser()
    is_run = (place / checkpoint.CHECKPOINTS).is_dir() or (place / checkpoint.PARAMS).is_dir()
    try:
        folder = Path(parallel.latest_checkpoint(place)) if is_run else Path(hf_files.find_folder(path))
        content = hf_files.read_json(folder / hf_files.CONFIG)
    except OSError as error:
        raise OSError(f"{setting} = {str(path)!r}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{setting} = {str(path)!r}: its config is damaged: {error}") from None
    return Start(folder, is_run, content)

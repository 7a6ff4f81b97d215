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
                f"{self.folder}: a checkpoint of model_type {found!r}, where {family!r} is wanted"
            )
        try:
            return modelzoo.get_family(family).config_class.from_hf(self.content)
        except ValueError as error:
            raise ValueError(f"{self.folder / hf_files.CONFIG}: {error}") from None

    def read_params(self, model: modelzoo.Model, rules: parallel.Rules, rng: jax.Array) -> Any:
        """The parameters of a model, float32: the checkpoint's, and new ones of a head that it does not have.

        Args:
            model: of its family.
            rules: of the mesh.
            rng: PRNG key of what is new.

        Raises:
            OSError, ValueError: a file is missing or damaged, or does not fit the model's config.
        """
        if not self.is_run:
            dtypes: dict[str, Any] = dict(dtype=model.dtype, param_dtype=jnp.float32, config=model.config)
            return modelzoo.from_hf(self.folder, type(model), rules=rules, **dtypes)[1]
        saved_class = modelzoo.get_model_class(self.content["architectures"][0])
        saved = saved_class(self.config(model.config.model_type))
        known = dict(
            jax.tree.leaves_with_path(parallel.restore_params(self.folder, saved, rules, jnp.float32))
        )
        if known.keys() == dict(jax.tree.leaves_with_path(modelzoo.abstract_params(model))).keys():
            fresh: Any = parallel.abstract_sharded_params(model, rules)
        else:
            fresh = parallel.init_params(model, rng, rules)

        def choose(path: Any, leaf: Any) -> Any:
            have = known.get(path, leaf)
            if have.shape != leaf.shape:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"{self.folder}: its {name} is {list(have.shape)}, where the config makes it {list(leaf.shape)}"
                )
            return have

        return jax.tree.map_with_path(choose, fresh)


def open_start(path: str | os.PathLike[str]) -> Start:
    """Finds a checkpoint and reads its config.

    Args:
        path: a Hugging Face folder or hub id, a run's folder (its newest step is taken), or that of one step.

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
        raise OSError(f"train.init_from = {str(path)!r}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"train.init_from = {str(path)!r}: its config is damaged: {error}") from None
    return Start(folder, is_run, content)

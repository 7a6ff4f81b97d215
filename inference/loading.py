"""What a command line calls a checkpoint: a training run's folder, one of its steps, or a Hugging Face
model."""

import dataclasses
import json
import os
from typing import Any

import modelzoo
import parallel
from parallel.checkpoint import as_path

CONFIG = "config.json"
TEXT_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "generation_config.json")


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
        dtype = self.model.param_dtype
        if self.is_run:
            return parallel.restore_params(self.folder, self.model, rules, dtype)
        _, params = modelzoo.from_hf(
            self.folder, type(self.model), rules=rules, dtype=self.model.dtype, param_dtype=dtype
        )
        return params


def open_checkpoint(path: str | os.PathLike[str], dtype: Any) -> Checkpoint:
    """Finds a checkpoint and reads its config.

    Args:
        path: a run's folder (its newest step is taken), the folder of one step, a Hugging Face folder, or
            a hub id such as "EleutherAI/gpt-j-6b".
        dtype: to compute in and to keep the parameters in.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: its config is damaged, or is not of a model that generates text.
    """
    folder = as_path(path)
    is_run = "://" in str(path) or (folder.is_dir() and not (folder / CONFIG).is_file())
    is_run = is_run or (folder / "params").is_dir()
    if is_run:
        folder = parallel.latest_checkpoint(path)
    elif not folder.is_dir():
        if "/" in str(path) and folder.parent.is_dir():  # a mistyped folder is not asked for on the hub
            raise OSError(f"no checkpoint at {str(path)!r}: there is no such folder")
        folder = _from_hub(str(path))
    content = _read_json(folder / CONFIG)
    try:
        model = _model_class(content)
        config: Any = modelzoo.get_family(content.get("model_type", "")).config_class.from_hf(content)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    eos: Any = content.get("eos_token_id")
    if (folder / "generation_config.json").is_file():
        eos = _read_json(folder / "generation_config.json").get("eos_token_id", eos)
    eos = eos if isinstance(eos, list) else [eos]
    # Small models often keep the id of the vocabulary that theirs was cut from, which can never be generated.
    ends = tuple(token for token in eos if token in range(config.vocab_size))
    return Checkpoint(folder, model(config, dtype, dtype), is_run, ends or None)


def _model_class(content: dict[str, Any]) -> type[modelzoo.Model]:
    named = content.get("architectures") or ["(none)"]
    if named == ["(none)"]:
        raise ValueError("names no architecture, so there is no telling whether it has a language-model head")
    model = modelzoo.get_model_class(named[0])
    if model.task != "causal_lm":
        raise ValueError(f"{named[0]} does not generate text: a checkpoint of a ...ForCausalLM does")
    return model


def _read_json(file: Any) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise OSError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def _from_hub(name: str) -> Any:
    """The local snapshot of a hub repository, with the files that text needs."""
    from modelzoo.hf_files import find_folder

    folder = find_folder(name)  # its errors say that there is neither such a folder nor such a repository
    import huggingface_hub

    huggingface_hub.snapshot_download(name, allow_patterns=list(TEXT_FILES))
    return folder

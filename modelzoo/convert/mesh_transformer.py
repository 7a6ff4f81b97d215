"""mesh-transformer-jax's checkpoints of GPT-J: folders shard_0 .. shard_7, of 16 files of arrays without names.

A shard holds one model-parallel part of every parameter. The arrays stand in the order in which jax flattens
the training state: optimizer (which slim checkpoints lack), parameters, step; dicts by key, so that layer_10
comes before layer_2. bfloat16 numbers carry numpy's type V2, raw bytes.

Reference: https://github.com/kingoflolz/mesh-transformer-jax, mesh_transformer/{checkpoint,layers}.py.
"""

import dataclasses
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modelzoo.convert.checkpoint import Checkpoint, Tensor, joined, summed

FILES = 16
RAW = np.dtype("V2")
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
GPTJ_6B: dict[str, Any] = {
    "layers": 28,
    "d_model": 4096,
    "n_heads": 16,
    "n_vocab": 50400,
    "pe_rotary_dims": 64,
    "seq": 2048,
}
"""configs/6B_roto_256.json."""
# A layer's arrays in their order: (transformers' name, the axis along which shards are joined). Biases that
# every shard adds before the sum over shards are summed; a norm is the same on all.
SUM, SAME = "sum", "same"
LAYER: tuple[tuple[str, int | str], ...] = (
    ("attn.q_proj.weight", 1),
    ("attn.v_proj.weight", 1),
    ("attn.k_proj.weight", 1),
    ("attn.out_proj.weight", 0),
    ("mlp.fc_in.bias", 0),
    ("mlp.fc_in.weight", 1),
    ("mlp.fc_out.bias", SUM),
    ("mlp.fc_out.weight", 0),
    ("ln_1.bias", SAME),
    ("ln_1.weight", SAME),
)
EMBED: tuple[tuple[str, int | str], ...] = (("wte.bias", SUM), ("wte.weight", 0))
HEAD: tuple[tuple[str, int | str], ...] = (
    ("lm_head.bias", 0),
    ("lm_head.weight", 1),
    ("transformer.ln_f.bias", SAME),
    ("transformer.ln_f.weight", SAME),
)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a config says, in mesh-transformer-jax's words."""

    layers: int
    d_model: int
    n_heads: int
    n_vocab: int
    pe_rotary_dims: int
    seq: int


def read_mesh_transformer(path: Path, config: Mapping[str, Any] | None, scratch: Path) -> Checkpoint:
    """Reads a checkpoint of GPT-J's architecture, slim or with its optimizer, on any number of shards.

    Args:
        path: the folder that holds shard_0 and the others, or a tar file of it.
        config: the run's config (`layers`, `d_model`, `n_heads`, ...) or a config.json of GPT-J; None is
            GPT-J-6B's.
        scratch: an empty folder for what a tar file holds.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is corrupt, or the arrays are not those of the config.
    """
    folder = path if path.is_dir() else path.parent
    shards = _find_shards(path if path.is_dir() else _unpack(path, scratch), path)
    sizes = _sizes(path, config)
    said = (config or {}).get("cores_per_replica", len(shards))
    if said != len(shards):
        raise ValueError(f"{path}: {len(shards)} shards, where the config's cores_per_replica is {said}")
    arrays = [list(_arrays(shard, path)) for shard in shards]
    counts = sorted({len(held) for held in arrays})
    if len(counts) > 1:
        raise ValueError(f"{path}: its shards hold different numbers of arrays: {counts}")
    wanted = len(EMBED) + len(LAYER) * sizes.layers + len(HEAD) + 1
    if counts[0] < wanted:
        raise ValueError(
            f"{path}: {counts[0]} arrays, where {sizes.layers} layers have {wanted}: a file is missing, or pass "
            "--config with the run's own config"
        )
    try:
        tensors = _convert([held[-wanted:-1] for held in arrays], sizes)
        rows = tensors["transformer.wte.weight"].shape[0]
        if rows != sizes.n_vocab:
            raise ValueError(
                f"{len(shards)} shards hold {rows} rows of the vocabulary, where the config has {sizes.n_vocab}: "
                "shards are missing, or pass --config with the run's own config"
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Checkpoint(_hf_config(sizes, config), tensors, folder)


def _sizes(path: Path, config: Mapping[str, Any] | None) -> _Sizes:
    """The sizes, from either kind of config."""
    said: dict[str, Any] = dict(config or GPTJ_6B)
    if "n_embd" in said:
        if said.get("model_type", "gptj") != "gptj":
            raise ValueError(f"{path}: the config is of model_type {said['model_type']!r}, not 'gptj'")
        spelled = {"layers": "n_layer", "d_model": "n_embd", "n_heads": "n_head", "n_vocab": "vocab_size"}
        spelled |= {"pe_rotary_dims": "rotary_dim", "seq": "n_positions"}
        said = {ours: said.get(theirs) for ours, theirs in spelled.items()}
    for field, value in (("norm", "layernorm"), ("pe", "rotary")):
        if said.get(field, value) != value:
            raise ValueError(f"{path}: the config has {field} = {said[field]!r}; GPT-J has {value!r}")
    for field in dataclasses.fields(_Sizes):
        if field.name == "pe_rotary_dims" and said.get(field.name) is None and said.get("n_heads"):
            said[field.name] = said["d_model"] // said["n_heads"]  # all of a head
        if type(said.get(field.name)) is not int or said[field.name] < 1:
            raise ValueError(f"{path}: the config's {field.name} is {said.get(field.name)!r}, not a size")
    return _Sizes(**{field.name: said[field.name] for field in dataclasses.fields(_Sizes)})


def _hf_config(sizes: _Sizes, config: Mapping[str, Any] | None) -> dict[str, Any]:
    if config is not None and "n_embd" in config:
        return {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], **config}
    end = 50256 if sizes.n_vocab > 50256 else sizes.n_vocab - 1
    return {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_embd": sizes.d_model,
        "n_head": sizes.n_heads,
        "n_inner": None,
        "n_layer": sizes.layers,
        "n_positions": sizes.seq,
        "rotary_dim": sizes.pe_rotary_dims,
        "tie_word_embeddings": False,
        "tokenizer_class": "GPT2Tokenizer",
        "use_cache": True,
        "vocab_size": sizes.n_vocab,
    }


def _convert(shards: list[list[Tensor]], sizes: _Sizes) -> dict[str, Tensor]:
    """The parameters in their order, by transformers' names, joined over shards and transposed."""
    rows = [(f"transformer.{name}", how) for name, how in EMBED]
    for number in sorted(map(str, range(sizes.layers))):
        rows += [(f"transformer.h.{number}.{name}", how) for name, how in LAYER]
    rows += HEAD
    tensors: dict[str, Tensor] = {}
    for (name, how), parts in zip(rows, zip(*shards, strict=True), strict=True):
        parts = [dataclasses.replace(part, name=f"{name} ({part.name})") for part in parts]
        if isinstance(how, int):
            tensor = joined(parts, how)
        else:
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"the parts of {parts[0].name} have different shapes")
            tensor = summed(parts) if how == SUM else parts[0]
        tensors[name] = tensor if name == "transformer.wte.weight" else tensor.transposed
    # The embedding is a linear layer with a bias there: a vector that every row gets.
    bias, words = tensors.pop("transformer.wte.bias"), tensors["transformer.wte.weight"]
    if bias.shape != words.shape[1:]:
        raise ValueError(f"{bias.name} is {list(bias.shape)} beside {list(words.shape)}")
    tensors["transformer.wte.weight"] = summed([words, bias])
    return tensors


def _arrays(shard: Path, path: Path) -> Iterator[Tensor]:
    """A shard's arrays, in their order; reads their headers."""
    for number in range(FILES):
        file = shard / f"{number}.npz"
        if not file.is_file():
            raise FileNotFoundError(f"{path}: {shard.name} has no {file.name}: each shard has {FILES} files")
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                for name in names:
                    with archive.open(name) as stream:
                        shape, dtype = _header(stream)
                    if dtype.hasobject:
                        raise ValueError(f"{name} holds Python objects, which are pickles")
                    label = f"{shard.name}/{file.name}:{name.removesuffix('.npy')}"
                    kind = np.dtype(ml_dtypes.bfloat16) if dtype == RAW else dtype
                    yield Tensor(label, shape, kind, _reader(file, name, kind))
        except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{file}: not a sound .npz file ({error}); fetch it again") from None


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _reader(file: Path, name: str, dtype: np.dtype) -> Any:
    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(file) as archive, archive.open(name) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file}: not a sound .npz file ({error}); fetch it again") from None
        return array.view(dtype) if array.dtype == RAW else array

    return read


def _find_shards(folder: Path, path: Path) -> list[Path]:
    """shard_0 and the others, in order, in a folder or the only folder in it."""
    found = {
        int(match[1]): child
        for child in folder.iterdir()
        if (match := re.fullmatch(r"shard_(\d+)", child.name))
    }
    if not found:
        inner = [child for child in folder.iterdir() if child.is_dir()]
        if (folder / "meta.json").is_file() and (folder / "params").is_dir():
            raise ValueError(
                f"{path}: a checkpoint of CausalTransformerV2 (meta.json, params/), which is not read"
            )
        if len(inner) == 1:
            return _find_shards(inner[0], path)
        raise FileNotFoundError(
            f"{path}: has no shard_0: pass the step_NNN folder that holds shard_0 to shard_7"
        )
    if missing := [f"shard_{i}" for i in range(max(found) + 1) if i not in found]:
        raise FileNotFoundError(f"{path}: {len(missing)} shards are missing: {', '.join(missing)}")
    return [found[i] for i in sorted(found)]


def _unpack(path: Path, scratch: Path) -> Path:
    """Unpacks the shards in a tar file."""
    with open(path, "rb") as stream:
        if stream.read(4) == ZSTD_MAGIC:
            raise ValueError(
                f"{path}: is compressed with zstd: unpack it first (tar --zstd -xf), and pass its folder"
            )
    try:
        with tarfile.open(path) as archive:
            for entry in archive:
                match = re.search(r"(?:^|/)(shard_\d+)/(\d+\.npz)$", entry.name)
                if match and entry.isfile():
                    entry.name = f"{match[1]}/{match[2]}"
                    archive.extract(entry, scratch, filter=tarfile.data_filter)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: neither a folder nor a sound tar file ({error})") from None
    return scratch

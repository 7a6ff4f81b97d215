"""Megatron-LM's BERT and GPT, merged over ranks: NVIDIA's releases and training checkpoints.

The rows of a fused query-key-value weight have had three orders (`checkpoint_version`), on each rank for the
heads that it has:
    0 or none    [3, heads, head_dim]      1.0    [heads, head_dim, 3]      2.0 and later    [heads, 3, head_dim]
Paper: Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053.

The result is what transformers' convert_megatron_bert_checkpoint.py, convert_megatron_gpt2_checkpoint.py and
checkpoint_reshaping_and_interoperability.py make of the same file, config included, but for this: version 0
split over ranks is put together by heads, where the last of these mixes queries, keys and values; and what
transformers itself leaves out of files (tied copies, causal masks) is left out.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelzoo.convert import megatron_names as names
from modelzoo.convert.checkpoint import Checkpoint, Tensor, find_misfit, joined, part_of_rows, stored
from modelzoo.convert.megatron_configs import bert_config, check_options, gpt2_config, sizes_of
from modelzoo.convert.megatron_files import Rank, read_ranks
from modelzoo.tensor_files import TensorRef

LAYER = re.compile(r"(transformer\.layers\.)(\d+)\.")
Stage = list[dict[str, TensorRef]]
"""One pipeline stage's tensors on each tensor rank."""


def read_megatron_bert(path: Path, config: Mapping[str, Any] | None, scratch: Path) -> Checkpoint:
    """Reads a Megatron-BERT; arguments, result and errors as of `read_megatron_lm`."""
    return _read(path, config, scratch, release=True)


def read_megatron_lm(path: Path, config: Mapping[str, Any] | None, scratch: Path) -> Checkpoint:
    """Reads a Megatron-LM checkpoint of a GPT or a BERT, on however many ranks.

    Args:
        path: a zip, a model_optim_rng.pt, or a folder at any height above one.
        config: a config.json for what the file's own options do not say; its vocab_size is the true one, to
            which a padded vocabulary is cut.
        scratch: an empty folder for what a zip holds.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is corrupt, ranks are missing, or the model is none that transformers has.
    """
    return _read(path, config, scratch, release=False)


def _read(path: Path, config: Mapping[str, Any] | None, scratch: Path, release: bool) -> Checkpoint:
    ranks = read_ranks(path, scratch)
    first = ranks[0][0]
    try:
        stages = _stages(ranks)
        is_bert = any(name.startswith(names.BERT_ONLY) for stage in stages for name in stage[0])
        if release and not is_bert:
            raise ValueError("holds a GPT, not a BERT: convert it with --from megatron-lm")
        options = first.args
        check_options(options, "MegatronBERT" if is_bert else "GPT-2")
        whole = _by_number(stages)
        _check_ranks(whole, options)
        rows = sum(ref.shape[0] for ref in _get(whole, "embedding.word_embeddings.weight"))
        hint = "" if options or config else "; the file has no options, so pass --config config.json"
        said = (options or {}).get("pipeline_model_parallel_size")
        if isinstance(said, int) and said > len(ranks):
            hint = f"; the run had {said} pipeline stages, of which {len(ranks)} are here"
        make = bert_config if is_bert else gpt2_config
        hf_config, notes = make(options, config, whole[0], rows, cut=not release)
        tensors = _convert(whole, hf_config, _version(first), is_bert, hint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    folder = path if path.is_dir() else path.parent
    return Checkpoint(hf_config, tensors, folder, notes, checked=True)


def _stages(ranks: list[list[Rank]]) -> list[Stage]:
    """The ranks' tensors, in the order of the layers; each stage may hold several chunks of them."""
    chunks = sorted(key for key in ranks[0][0].content if re.fullmatch(r"model\d*", str(key)))
    if "model" in chunks:
        chunks = ["model"]
    stages = []
    for chunk in sorted(chunks, key=lambda key: int(key.removeprefix("model") or 0)):
        for stage in ranks:
            models = [rank.content.get(chunk) for rank in stage]
            if not all(isinstance(model, dict) for model in models):
                raise ValueError(f"not all of its ranks have a table {chunk!r}")
            stages.append([names.flat_names(model) for model in models if isinstance(model, dict)])
    for stage in stages:
        for rank in stage[1:]:
            if differ := sorted(rank.keys() ^ stage[0].keys()):
                raise ValueError(f"its tensor-parallel ranks differ in {differ[0]}")
    return stages


def _by_number(stages: list[Stage]) -> Stage:
    """One stage that holds all layers; every stage counts its own from 0."""
    merged: Stage = [{} for _ in stages[0]]
    before = 0
    for stage in stages:
        numbers = [int(match[2]) for name in stage[0] if (match := LAYER.match(name))]
        for rank, tensors in zip(merged, stage, strict=True):
            for name, ref in tensors.items():
                if match := LAYER.match(name):
                    name = f"{match[1]}{int(match[2]) + before}{name[match.end(2) :]}"
                rank.setdefault(name, ref)
        before += max(numbers, default=-1) + 1
    return merged


def _get(whole: Stage, name: str) -> list[TensorRef]:
    """A matrix on all ranks."""
    if name not in whole[0]:
        raise ValueError(
            f"it has no {name}: not a BERT or GPT of Megatron-LM, or a pipeline stage is missing"
        )
    return [_of_rank(name, rank[name], 2) for rank in whole]


def _of_rank(name: str, ref: TensorRef, rank: int) -> TensorRef:
    if len(ref.shape) != rank:
        raise ValueError(f"{name} has shape {list(ref.shape)}, where {rank} dimensions belong")
    return ref


def _check_ranks(whole: Stage, options: Mapping[str, Any] | None) -> None:
    """Whether ranks are missing: from the shapes, as options may be of a run before ranks were merged."""
    fused = _get(whole, names.QKV.format(0) + ".weight")
    rows, width = sum(ref.shape[0] for ref in fused), fused[0].shape[-1]
    if rows != 3 * width:
        options = options or {}
        said = options.get("tensor_model_parallel_size", options.get("model_parallel_size"))
        wanted = (
            f"{said} tensor-parallel ranks" if isinstance(said, int) and said > len(whole) else "more ranks"
        )
        raise ValueError(
            f"has {len(whole)} tensor-parallel ranks, where the run had {wanted}: a fused query-key-value weight "
            f"comes to {rows} rows of {3 * width}; pass the folder that holds mp_rank_00 and all others"
        )


def _version(rank: Rank) -> float:
    version = rank.content.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or not (version in (0, 1) or version >= 2):
        raise ValueError(f"checkpoint_version {version!r} is unknown: 0, 1.0 and 2.0 upwards are read")
    return float(version)


def _convert(
    whole: Stage, config: Mapping[str, Any], version: float, is_bert: bool, hint: str
) -> dict[str, Tensor]:
    """The tensors by transformers' names, which are those that the config wants.

    Raises:
        ValueError: they are not; ends with `hint`.
    """
    sizes = sizes_of(config)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    left = dict.fromkeys(whole[0])

    for layer in names.layers_of(
        is_bert, config["architectures"][0], config.get("tie_word_embeddings", True)
    ):
        for number in range(sizes["layers"]) if "{}" in layer.source else (0,):
            for suffix, letters, split in layer.tensors():
                source = layer.source.replace("{}", str(number)) + suffix
                target = layer.target.replace("{}", str(number)) + suffix
                shape = tuple(sizes[letter] for letter in letters)
                shapes[target] = shape[::-1] if layer.flipped else shape
                if source in left:
                    del left[source]
                    parts = [stored(source, _of_rank(source, rank[source], len(letters))) for rank in whole]
                    tensor = parts[0] if split is None else joined(parts, split)
                    tensor = tensor.first_rows(sizes["v"]) if letters[0] == "v" else tensor
                    tensors[target] = tensor.transposed if layer.flipped else tensor

    for number in range(sizes["layers"]):
        for suffix, dims in ((".weight", (sizes["d"],)), (".bias", ())):
            source = names.QKV.replace("{}", str(number)) + suffix
            targets = [target.replace("{}", str(number)) + suffix for target in names.qkv_targets(is_bert)]
            if source in left:
                del left[source]
                refs = [_of_rank(source, rank[source], 1 + len(dims)) for rank in whole]
                found = _unfuse(source, refs, sizes["n"], version, hint)
                found = found if is_bert else [joined(found, 0).transposed]
                tensors |= dict(zip(targets, found, strict=True))
            shape = (sizes["d"], *dims) if is_bert else (*dims, 3 * sizes["d"])
            shapes |= dict.fromkeys(targets, shape)

    if config["architectures"][0] == "MegatronBertModel":  # a trunk alone has no prefix
        tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
        shapes = {name.removeprefix("bert."): shape for name, shape in shapes.items()}
    tensors |= {f"Megatron's {name}": stored(name, whole[0][name]) for name in left}
    if misfit := find_misfit(shapes, tensors):
        raise ValueError(f"its tensors are not those of {config['architectures'][0]}: {misfit}{hint}")
    return tensors


def _unfuse(name: str, ranks: Sequence[TensorRef], num_heads: int, version: float, hint: str) -> list[Tensor]:
    """Queries, keys and values, each with its heads in order."""
    rows = ranks[0].shape[0]
    own_heads, rest = divmod(num_heads, len(ranks))
    if rest or rows % (3 * own_heads):
        raise ValueError(
            f"{name} has {rows} rows on each of {len(ranks)} tensor-parallel ranks, which the {num_heads} heads "
            f"of the config do not divide into queries, keys and values{hint}"
        )
    dim = rows // (3 * own_heads)
    if version == 0:
        dims, axis = (3, own_heads, dim), 0
    elif version == 1:
        dims, axis = (own_heads, dim, 3), 2
    else:
        dims, axis = (own_heads, 3, dim), 1
    for ref in ranks:
        if ref.shape != ranks[0].shape:
            raise ValueError(
                f"{name} is {list(ref.shape)} in {ref.file} and {list(ranks[0].shape)} in another"
            )
    return [joined([part_of_rows(name, ref, dims, axis, i) for ref in ranks], 0) for i in range(3)]

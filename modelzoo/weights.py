"""How a family's weight table is written and read: Hugging Face names on one side, parameters on the other.

A table (`<family>/weights.py`) is data: one `Weight` per tensor, with a pattern that says how the stored
tensor becomes the parameter. The inverse, for export, follows from the same row, and every size from the
model itself.

    Weight("transformer.h.{}.attn.q_proj.weight", "layers.attention.query.kernel", "(n h) d -> d n h")

The left side names the stored tensor's dimensions, a bracket being one dimension made of several axes; the
right side names the parameter's (one layer's, where the source holds `{}`). Both hold the same axes, in any
order. A dimension of size one that only the file has is written `1`. A tensor that fuses several parameters
has a tuple of targets, and its right side begins with the axis that tells them apart:

    Weight("h.{}.qkv.weight", ("layers.query", "layers.key", "layers.value"), "(n c h) d -> c d n h")
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

Path = tuple[str, ...]
TRUNK = "trunk"


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of a table.

    Attributes:
        source: the tensor's name in a file of a class with a head; `{}` stands for the layer's number.
        target: the parameter, as a dotted path from the trunk (if the source has the table's prefix) or from
            the root of the tree; several for a fused tensor.
        pattern: stored dimensions -> the parameter's dimensions.
        also: other names under which files hold the same tensor (a tied copy, an older spelling). Read only
            where the file lacks `source`, never written.
        without: a part of the trunk; the row is for classes that lack it. Of several rows with one target the first
            that is for a class says what it calls the tensor.
        optional: belongs to a part that only some classes have though it stands in the trunk, such as a pooler. To a
            checkpoint it is what a head is: a class may lack it, and another class then creates it.
        untied: names that it is written under as well where the config ties no embeddings: of tensors that version 4
            shares in any case, and version 5 only where the config ties them.
    """

    source: str
    target: str | tuple[str, ...]
    pattern: str
    also: tuple[str, ...] = ()
    without: str = ""
    optional: bool = False
    untied: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[Path, ...]:
        """The targets as tuples of path segments."""
        targets = (self.target,) if isinstance(self.target, str) else self.target
        return tuple(tuple(target.split(".")) for target in targets)


@dataclasses.dataclass(frozen=True)
class WeightTable:
    """The names of one family.

    Attributes:
        prefix: what transformers puts before the trunk's names in classes with a head, such as
            "transformer.".
        weights: the rows.
        ignored: regular expressions of names that carry nothing (buffers); searched in the whole name.
        renames: (regular expression, replacement) applied to the names of a file before anything else.
    """

    prefix: str
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()

    def rename(self, name: str) -> str:
        """The name in this table's spelling."""
        for old, new in self.renames:
            name = re.sub(old, new, name)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name carries nothing."""
        return any(re.search(pattern, name) for pattern in self.ignored)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as one model wants it: a row of the table with its layer and its sizes.

    Attributes:
        name: the name that this class writes.
        names: the names that it is read under, best first.
        copies: names of copies of it, read only where none of `names` is there.
        paths: the parameters it becomes; more than one for a fused tensor.
        layer: its place on the parameters' leading axis, or None where they are not stacked.
        groups: the axes of each stored dimension.
        axes: the axes of each dimension of the parameter (of one layer of it).
        sizes: of every axis.
        fused: the axis that tells the targets apart, or None.
        in_head: whether it belongs to the head, or to an optional part, rather than to the trunk.
        untied: further names that it is written under where the config ties no embeddings.
    """

    name: str
    names: tuple[str, ...]
    copies: tuple[str, ...]
    paths: tuple[Path, ...]
    layer: int | None
    groups: tuple[tuple[str, ...], ...]
    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    fused: str | None
    in_head: bool
    untied: tuple[str, ...] = ()

    def written(self, ties: bool) -> tuple[str, ...]:
        """The names that this class writes it under; `ties` is the config's tie_word_embeddings."""
        return (self.name, *(() if ties else self.untied))

    @property
    def part(self) -> str:
        """The part of the trunk, or the head, that it belongs to."""
        return self.paths[0][1 if self.paths[0][0] == TRUNK else 0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self.groups)

    @property
    def file_axes(self) -> tuple[str, ...]:
        """All axes, in the order of the file."""
        return tuple(axis for group in self.groups for axis in group)


@functools.lru_cache
def parse(pattern: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Splits "(n h) d -> d n h" into ((("n", "h"), ("d",)), ("d", "n", "h")); `1` is an empty group."""
    left, right = pattern.split("->")
    groups = tuple(
        () if item == "1" else tuple(item.strip("()").split())
        for item in re.findall(r"\([^)]*\)|[^\s()]+", left)
    )
    axes = tuple(right.split())
    flat = [axis for group in groups for axis in group]
    assert sorted(flat) == sorted(set(axes)), f"{pattern!r} loses or invents an axis"
    return groups, axes


def flatten(tree: Any, path: Path = ()) -> dict[Path, Any]:
    """The leaves of nested mappings by path."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {key: leaf for name, sub in tree.items() for key, leaf in flatten(sub, (*path, name)).items()}


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def bind(table: WeightTable, shapes: Mapping[Path, Any]) -> list[StoredTensor]:
    """The tensors that a model's checkpoint holds.

    Args:
        table: the family's.
        shapes: the model's parameters (`abstract_params`), flattened.

    Returns:
        One entry per tensor, in the order of the table, layers in turn. Rows whose parameter the model does
        not have (other heads) are left out; every parameter is covered once.
    """
    has_trunk = any(path[0] == TRUNK for path in shapes)
    parts = {path[1] if path[0] == TRUNK else path[0] for path in shapes}
    rows: list[tuple[tuple[Path, ...], Weight]] = []
    for weight in table.weights:
        root = (TRUNK,) if has_trunk and weight.source.startswith(table.prefix) else ()
        paths = tuple((*root, *target) for target in weight.targets)
        named = any(paths == others and other.without for others, other in rows)
        if all(path in shapes for path in paths) and weight.without not in parts and not named:
            rows.append((paths, weight))
    sources = {weight.source for _, weight in rows}
    tensors: list[StoredTensor] = []
    for paths, weight in rows:
        in_trunk = weight.source.startswith(table.prefix)
        groups, axes = parse(weight.pattern)
        shape = shapes[paths[0]].shape
        fused = axes[0] if len(paths) > 1 else None
        axes = axes[1:] if fused else axes
        layers = (None,)
        if "{}" in weight.source:
            num_layers, *shape = shape
            layers = range(num_layers)
        assert len(shape) == len(axes), (
            f"{weight.source}: {weight.pattern!r} is not of the parameter's rank {len(shape)}"
        )
        sizes = dict(zip(axes, shape, strict=True)) | ({fused: len(paths)} if fused else {})
        spellings = [table.prefix, ""] if has_trunk else ["", table.prefix]
        names = [weight.source]
        if in_trunk:
            names = [prefix + weight.source.removeprefix(table.prefix) for prefix in spellings]
        for layer in layers:
            of_layer = tuple(name.replace("{}", str(layer)) for name in names)
            # A tied head's tensor is a copy only where the head is tied.
            also = (name for name in weight.also if name not in sources)
            copies = tuple(name.replace("{}", str(layer)) for name in also)
            in_head = weight.optional or not in_trunk
            untied = weight.untied
            if in_trunk:
                untied = tuple(spellings[0] + name.removeprefix(table.prefix) for name in untied)
            stored = (groups, axes, sizes, fused, in_head, untied)
            tensors.append(StoredTensor(of_layer[0], of_layer, copies, paths, layer, *stored))
    covered = [path for tensor in tensors if not tensor.layer for path in tensor.paths]
    assert sorted(covered) == sorted(shapes), (
        f"the table and the model differ in {set(covered) ^ set(shapes)}"
    )
    return tensors


def is_other_head(table: WeightTable, shapes: Iterable[Path], name: str) -> bool:
    """Whether `name` belongs to the family, but to a part that the model of `shapes` does not have."""
    paths = {path[1:] if path[0] == TRUNK else path for path in shapes}
    for weight in table.weights:
        spellings = (weight.source, weight.source.removeprefix(table.prefix), *weight.also)
        pattern = "|".join(re.escape(spelling).replace(r"\{\}", r"\d+") for spelling in spellings)
        if re.fullmatch(pattern, name):
            return not all(target in paths for target in weight.targets)
    return False

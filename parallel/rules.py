"""Every table from logical axes to mesh axes, and the checks that keep it honest.

    logical     mesh            what it does
    ----------  --------------  ----------------------------------------------------------------------------
    layers      stage           each pipeline stage holds its own layers
    embed       fsdp            ZeRO-3: parameters, gradients and optimizer state in shards, gathered when used
    heads, kv   tensor          Megatron: attention split by heads (query, key, value by column, output by row)
    mlp         tensor          Megatron: first product by column, second by row
    vocab       tensor          vocabulary-parallel embedding, LM head and cross-entropy; with stages, over those too
    act_batch   data, fsdp      the batch
    act_heads, act_mlp, act_vocab   tensor   activations between a column split and its row split
    act_length  context         the sequence, wherever a layer sees all of it that its device has
    act_stream  context         the sequence between layers; with sequence=True also tensor, which turns the all-reduce
                                after a row split into a reduce-scatter there and an all-gather before the next column
                                split

Megatron: Shoeybi et al., 2019, arXiv:1909.08053. Sequence: Korthikanti et al., 2022, arXiv:2205.05198. ZeRO:
Rajbhandari et al., 2020, arXiv:1910.02054. Attention over a sequence that `context` splits is `parallel.context`'s.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modelzoo import hf
from modelzoo.layers.attention import attend_by
from parallel import context
from parallel.context import CONTEXT_ATTENTION

Names = tuple[str | None, ...]
MeshAxes = tuple[str, ...]

DEFAULT: dict[str, MeshAxes] = {
    "layers": ("stage",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "act_batch": ("data", "fsdp"),
    "act_length": ("context",),
    "act_stream": ("context",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}

WITH_STAGES: dict[str, MeshAxes] = {"vocab": ("stage", "tensor"), "act_vocab": ("stage", "tensor")}
"""What differs on a mesh with stages: none of them waits while another computes the embedding or the logits."""

WITH_SEQUENCE: dict[str, MeshAxes] = {"act_stream": ("context", "tensor")}
"""What differs with sequence=True: norms, dropout and residuals hold their part of the sequence alone."""

PADDED_AXES = frozenset({"vocab"})
"""Logical axes whose size is rounded up to what the mesh divides; all others must divide as they are."""

LARGE_PARAMETER = 2**16
"""Elements from which on a parameter must not be left replicated along a mesh axis that was meant for it."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where every logical axis lies on one mesh. Made by `make_rules`; hashable, so a static argument of jit.

    Attributes:
        mesh: the mesh.
        table: (logical axis, mesh axes) pairs.
        context_attention: one of CONTEXT_ATTENTION.
    """

    mesh: Mesh
    table: tuple[tuple[str, MeshAxes], ...]
    context_attention: str = "ring"

    def mesh_axes(self, name: str | None) -> MeshAxes:
        """The mesh axes that a logical axis lies on.

        Raises:
            ValueError: the table does not know the name.
        """
        if name is None:
            return ()
        table = dict(self.table)
        if name not in table:
            raise ValueError(f"unknown logical axis {name!r}: the rules know {sorted(table)}")
        return table[name]

    def num_shards(self, name: str | None) -> int:
        """Into how many pieces a dimension of this name is cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.mesh_axes(name))

    def spec(self, names: Names, shape: tuple[int, ...] | None = None) -> PartitionSpec:
        """The PartitionSpec of an array.

        Args:
            names: a logical axis name, or None, per dimension.
            shape: its shape, to check that the mesh divides it; None skips the check.

        Raises:
            ValueError: an unknown name, one mesh axis twice, or a dimension that the mesh does not divide.
        """
        owner: dict[str, str] = {}
        for name in names:
            for axis in self.mesh_axes(name):
                if axis in owner:
                    raise ValueError(
                        f"mesh axis {axis!r} twice in the spec of {names}: logical axes {owner[axis]!r} and {name!r} "
                        "both lie on it; give one of them another rule"
                    )
                owner[axis] = str(name)
        if shape is not None:
            assert len(names) == len(shape), f"{len(names)} names for the shape {shape}"
            for name, dim in zip(names, shape, strict=True):
                if dim % self.num_shards(name):
                    sizes = " x ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.mesh_axes(name))
                    raise ValueError(
                        f"logical axis {name!r} has size {dim}, which mesh {sizes} does not divide: "
                        f"{self._nearest(name, dim)}"
                    )
        return PartitionSpec(*(self._entry(name) for name in names))

    def sharding(self, names: Names, shape: tuple[int, ...] | None = None) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(names, shape))

    def for_decoding(self) -> "Rules":
        """The rules of a program that holds a cache: one token at a time leaves no sequence to split.

        Raises:
            ValueError: the mesh splits the sequence or the layers.
        """
        for axis, name, what in (("context", "act_length", "sequence"), ("stage", "layers", "layers")):
            if (size := self.num_shards(name)) > 1:
                tensor = self.mesh.shape["tensor"]
                raise ValueError(
                    f"mesh axis {axis}={size} splits the {what}, and a decoder's cache is not split so: the nearest "
                    f"mesh that works has {axis}=1,tensor={tensor * size}, or gives those devices to data"
                )
        table = tuple((name, () if name == "act_stream" else axes) for name, axes in self.table)
        return dataclasses.replace(self, table=table)

    def padded_shape(self, names: Names, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with every vocabulary dimension rounded up to what the mesh divides."""
        return tuple(
            -(-dim // self.num_shards(name)) * self.num_shards(name) if name in PADDED_AXES else dim
            for name, dim in zip(names, shape, strict=True)
        )

    def check_replication(
        self, path: str, names: Names, shape: tuple[int, ...], large: int = LARGE_PARAMETER
    ) -> None:
        """Refuses a large parameter that lies whole along a mesh axis that the default table meant for it.

        Args:
            path: the parameter's name, for the error.
            names, shape: its logical axes and shape.
            large: elements from which on a parameter counts.

        Raises:
            ValueError: it is left replicated.
        """
        if math.prod(shape) < large:
            return
        used = {axis for name in names for axis in self.mesh_axes(name)}
        for name in names:
            for axis in DEFAULT.get(name or "", ()):
                if axis not in used and self.mesh.shape[axis] > 1:
                    raise ValueError(
                        f"parameter {path} {shape} would lie whole on each of the {self.mesh.shape[axis]} devices of "
                        f"mesh axis {axis!r}: its axis {name!r} is meant for it, but the rules say "
                        f"{self.mesh_axes(name) or None}; restore the rule, or make the mesh axis 1"
                    )
        if not any(names) and any(self.mesh.shape[axis] > 1 for axis in ("fsdp", "tensor")):
            raise ValueError(
                f"parameter {path} {shape} has no logical axes, so nothing shards it: name its dimensions"
            )

    def _entry(self, name: str | None) -> str | MeshAxes | None:
        axes = self.mesh_axes(name)
        return axes[0] if len(axes) == 1 else axes or None

    def _nearest(self, name: str | None, dim: int) -> str:
        shards = self.num_shards(name)
        works = max(n for n in range(1, shards + 1) if dim % n == 0)
        axes = self.mesh_axes(name)
        said = f"{axes[0]}={works}" if len(axes) == 1 else f"{works} shards rather than {shards}"
        return f"the nearest that works is {said}"


def make_rules(
    mesh: Mesh, *, sequence: bool = False, context_attention: str = "ring", **overrides: str | MeshAxes | None
) -> Rules:
    """The logical-to-mesh table for a mesh.

    Args:
        mesh: from `make_mesh`.
        sequence: sequence parallelism: the tensor axis splits the activations between layers by length too.
        context_attention: over a sequence that the context axis splits, "ring" or "all-gather".
        overrides: variants of single rules: a logical axis with a mesh axis, a tuple of them, or None for
            "not sharded".

    Raises:
        ValueError: an unknown logical or mesh axis, an unknown kind of attention, or sequence without tensor.
    """
    if context_attention not in CONTEXT_ATTENTION:
        raise ValueError(
            f"context_attention={context_attention!r} is unknown: choose {' or '.join(CONTEXT_ATTENTION)}"
        )
    if sequence and mesh.shape["tensor"] == 1:
        raise ValueError(
            "sequence=True splits activations over the mesh axis tensor, which is 1 here: the nearest mesh that works "
            "has tensor=2; or leave sequence out"
        )
    table = DEFAULT | (WITH_STAGES if mesh.shape["stage"] > 1 else {}) | (WITH_SEQUENCE if sequence else {})
    for name, target in overrides.items():
        if name not in table:
            raise ValueError(f"unknown logical axis {name!r} in make_rules: the axes are {sorted(table)}")
        table[name] = (target,) if isinstance(target, str) else tuple(target or ())
    for name, axes in table.items():
        for axis in axes:
            if axis not in mesh.shape:
                raise ValueError(
                    f"unknown mesh axis {axis!r} in the rule of {name!r}: the mesh has {mesh.axis_names}"
                )
        if twice := [axis for axis in axes if axes.count(axis) > 1]:
            raise ValueError(f"mesh axis {twice[0]!r} twice in the rule of {name!r}: {axes}")
    return Rules(mesh, tuple(table.items()), context_attention)


@contextlib.contextmanager
def use(rules: Rules | None) -> Iterator[None]:
    """Puts a mesh and its rules in force: whatever traces or calls a model on a mesh runs inside.

    jit's cache knows the mesh but not the rules: a jitted function that may be called under different rules takes
    them as a static argument, or closes over them.

    Args:
        rules: None does nothing.
    """
    if rules is None:
        yield
        return
    flax_rules = [(name, rules._entry(name)) for name, _ in rules.table]
    attend = context.make_attend(rules.mesh, rules.mesh_axes("act_length"), rules.context_attention)
    with jax.set_mesh(rules.mesh), nn.logical_axis_rules(flax_rules), attend_by(attend):
        yield


hf.default_rules = make_rules  # so that from_hf(path, mesh=mesh) needs no rules spelled out

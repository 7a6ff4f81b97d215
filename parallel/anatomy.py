"""What a model consists of, as a planner counts it: kernels, stacks of layers, heads of attention; nothing allocated.

Everything follows from the shapes and logical axes of the parameters, so no family is known here.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

import modelzoo
from modelzoo.layers.stack import REMAT_POLICIES
from modelzoo.model import LM_TASKS
from parallel.rules import PADDED_AXES

LAYERS = "layers"
REMATS = ("none", *REMAT_POLICIES)
"""What a backward pass may recompute, the least first to be tried by whoever has memory to spare."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter.

    Attributes:
        path: its names.
        shape: true, with the layers of a stack.
        names: its logical axes.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str | None, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def size_on(self, shards: Mapping[str | None, int]) -> int:
        """Elements on one device, vocabularies padded, for so many shards of each logical axis."""
        return math.prod(
            -(-dim // shards.get(name, 1)) if name in PADDED_AXES else dim // shards.get(name, 1) or 1
            for name, dim in zip(self.names, self.shape, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Stack:
    """Identical layers.

    Attributes:
        path: where it stands.
        num_layers: L.
        leaves: its parameters.
        num_heads, head_dim: N, H of its attention.
        num_attentions: 2 with cross-attention.
        hidden, mlp_dim: D, F.
        num_norms: norms of a layer.
        norm_first: they stand before attention and MLP rather than behind them.
        num_kv_heads: K.
        mlp_inputs: kernels that enter the MLP: 2 with a gate.
    """

    path: tuple[str, ...]
    num_layers: int
    leaves: tuple[Leaf, ...]
    num_heads: int
    head_dim: int
    num_attentions: int
    hidden: int
    mlp_dim: int
    num_norms: int
    norm_first: bool
    num_kv_heads: int
    mlp_inputs: int

    @functools.cached_property
    def kernels(self) -> tuple[Leaf, ...]:
        """What activations are multiplied with."""
        return tuple(leaf for leaf in self.leaves if leaf.path[-1] == "kernel")

    @property
    def is_parallel(self) -> bool:
        """Whether attention and MLP read the same norm, side by side."""
        return self.num_norms == 1


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A model.

    Attributes:
        leaves: all parameters.
        stacks: in the order that they run.
        vocab: V where its outputs are scores over the vocabulary, else 0.
        hidden: D.
        tied: the head's kernel is the table of embeddings.
        head_kernels: kernels outside the stacks that every position meets, the vocabulary's among them.
        table: the embedding's.
        dropout: whether activations are dropped.
    """

    leaves: tuple[Leaf, ...]
    stacks: tuple[Stack, ...]
    vocab: int
    hidden: int
    tied: bool
    head_kernels: tuple[Leaf, ...]
    table: Leaf
    dropout: bool

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in self.leaves)

    def flops_per_token(self, length: int) -> float:
        """Model FLOPs of a forward pass, as `train.metrics.flops_per_token` counts a third of a step's.

        PaLM's count (Chowdhery et al., 2022, arXiv:2204.02311, appendix B): 2 for every parameter that a token meets,
        and 4 N H T a layer for attention's products, a causal one's not halved.

        Args:
            length: T.
        """
        multiplied = sum(leaf.size for stack in self.stacks for leaf in stack.kernels)
        multiplied += sum(leaf.size for leaf in self.head_kernels) + (self.table.size if self.tied else 0)
        pairs = sum(s.num_layers * s.num_attentions * s.num_heads * s.head_dim for s in self.stacks)
        return 2.0 * multiplied + 4.0 * pairs * length


def anatomy_of(model: modelzoo.Model) -> Anatomy:
    """Takes a model apart.

    Args:
        model: any model of the zoo with a stack of layers.
    """
    shapes = jax.tree.leaves_with_path(modelzoo.abstract_params(model))
    names = jax.tree.leaves(modelzoo.logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    leaves = tuple(
        Leaf(tuple(key.key for key in path), leaf.shape, axes)
        for (path, leaf), axes in zip(shapes, names, strict=True)
    )
    config: Any = model.config
    found: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves:
        if LAYERS in leaf.path:
            found.setdefault(leaf.path[: leaf.path.index(LAYERS)], []).append(leaf)
    norm_first = any("final_norm" in leaf.path for leaf in leaves)
    stacks = tuple(
        _stack(path, inside, norm_first)
        for path, inside in sorted(found.items(), key=lambda item: item[0][-1] == "decoder")
    )
    tables = [leaf for leaf in leaves if leaf.path[-1] == "embedding" and "vocab" in leaf.names]
    rest = [leaf for leaf in leaves if LAYERS not in leaf.path and leaf.path[-1] == "kernel"]
    head = tuple(leaf for leaf in rest if "lm_head" in leaf.path or model.task not in LM_TASKS)
    scores_words = model.task in LM_TASKS
    return Anatomy(
        leaves=leaves,
        stacks=stacks,
        vocab=config.vocab_size if scores_words else 0,
        hidden=config.hidden_size,
        tied=bool(getattr(config, "tie_word_embeddings", False)) and scores_words,
        head_kernels=head,
        table=tables[0],
        dropout=_has_dropout(config),
    )


def _has_dropout(config: Any) -> bool:
    values = (getattr(config, field.name) for field in dataclasses.fields(config) if "drop" in field.name)
    return any(isinstance(value, float) and value > 0 for value in values)


def _stack(path: tuple[str, ...], leaves: list[Leaf], norm_first: bool) -> Stack:
    queries = [leaf for leaf in leaves if leaf.path[-2:] == ("query", "kernel")]
    num_layers, hidden, num_heads, head_dim = queries[0].shape
    keys = next(leaf for leaf in leaves if leaf.path[-2:] == ("key", "kernel"))
    mlp = next(leaf for leaf in leaves if leaf.path[-2:] == ("fc_in", "kernel"))
    norms = [leaf for leaf in leaves if leaf.path[-1] == "scale" and "head_dim" not in leaf.names]
    return Stack(
        path,
        num_layers,
        tuple(leaves),
        num_heads,
        head_dim,
        len(queries),
        hidden,
        mlp.shape[-1],
        len(norms),
        norm_first,
        keys.shape[2],
        1 + any(leaf.path[-2:] == ("fc_gate", "kernel") for leaf in leaves),
    )

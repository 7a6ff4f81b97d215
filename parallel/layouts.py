"""Layouts that people write in a line: sizes of mesh axes with variants of the rules, or the name of a common layout.

    data=2,tensor=4             a mesh
    tensor=4,sequence           ... with sequence parallelism
    context=4,all-gather        ... whose attention gathers keys and values instead of passing them round
    pipeline                    a name: all devices are stages

Each name is also a file, configs/parallel/NAME.gin.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from parallel.context import CONTEXT_ATTENTION
from parallel.mesh import parse_mesh
from parallel.rules import Rules

LAYOUTS = {
    "data": "data=-1",
    "fsdp": "fsdp=-1",
    "tensor": "tensor=-1",
    "sequence": "tensor=-1,sequence",
    "context": "context=-1,ring",
    "pipeline": "stage=-1",
    "fsdp-tensor": "fsdp=-1,tensor=4",
    "rehearsal": "data=2,fsdp=2,tensor=2",
    "megatron": "stage=2,data=-1,tensor=2,sequence",
    "long-context": "fsdp=-1,context=4,ring",
}
"""Common layouts by name; -1 takes the devices that the others leave."""

_VARIANTS: dict[str, dict[str, Any]] = {
    "sequence": {"sequence": True},
    **{kind: {"context_attention": kind} for kind in CONTEXT_ATTENTION},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the variants of its rules.

    Attributes:
        sizes: keyword arguments of `make_mesh`.
        variants: keyword arguments of `make_rules`.
    """

    sizes: Mapping[str, int]
    variants: Mapping[str, Any]


def describe(rules: Rules | None) -> str:
    """A mesh and its rules as `parse_layout` reads them, without what is usual; "one device" where nothing is split."""
    if rules is None:
        return "one device"
    sizes = {axis: size for axis, size in rules.mesh.shape.items() if size > 1}
    words = [f"{axis}={size}" for axis, size in sizes.items()]
    if (set(rules.mesh_axes("act_stream")) - set(rules.mesh_axes("act_length"))) & set(sizes):
        words.append("sequence")
    if "context" in sizes and rules.context_attention != CONTEXT_ATTENTION[0]:
        words.append(rules.context_attention)
    return ",".join(words) or "one device"


def parse_layout(text: str) -> Layout:
    """Reads a layout as people write it.

    Raises:
        ValueError: no such layout, mesh axis or variant, or a size that is no integer.
    """
    parts = [part.strip() for part in LAYOUTS.get(text.strip(), text).split(",") if part.strip()]
    sizes = [part for part in parts if "=" in part]
    variants: dict[str, Any] = {}
    for word in parts:
        if "=" in word:
            continue
        if word not in _VARIANTS:
            raise ValueError(
                f"{word!r} in {text!r} is no layout and no variant: the layouts are {', '.join(LAYOUTS)}, the variants "
                f"{', '.join(_VARIANTS)}, and a mesh axis is written as AXIS=N"
            )
        variants |= _VARIANTS[word]
    return Layout(parse_mesh(",".join(sizes)), variants)

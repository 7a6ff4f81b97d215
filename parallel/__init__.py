"""Where arrays live: meshes, the rules that lay logical axes on them, sharded parameters and checkpoints.

mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
rules = parallel.make_rules(mesh)
params = parallel.init_params(model, jax.random.key(0), rules)
with parallel.use(rules):
    out = jax.jit(model.apply)({"params": params}, input_ids=ids)
"""

import importlib
from typing import TYPE_CHECKING, Any

from parallel.host import prepare_collectives

if TYPE_CHECKING:
    from parallel.array_picture import draw_array
    from parallel.checkpoint import latest_checkpoint, restore_params
    from parallel.cluster import initialize
    from parallel.mesh import MESH_AXES, make_mesh, parse_mesh
    from parallel.report import ProgramReport, inspect_program
    from parallel.rules import Rules, make_rules, use
    from parallel.shard import (
        abstract_sharded_params,
        batch_sharding,
        fill_params,
        init_params,
        param_shardings,
        shard_params,
        unpad_params,
    )

prepare_collectives()

__all__ = [
    "MESH_AXES",
    "ProgramReport",
    "Rules",
    "abstract_sharded_params",
    "batch_sharding",
    "draw_array",
    "fill_params",
    "init_params",
    "initialize",
    "inspect_program",
    "latest_checkpoint",
    "make_mesh",
    "make_rules",
    "param_shardings",
    "parse_mesh",
    "restore_params",
    "shard_params",
    "unpad_params",
    "use",
]

_HOMES = {
    "MESH_AXES": "mesh",
    "ProgramReport": "report",
    "Rules": "rules",
    "abstract_sharded_params": "shard",
    "batch_sharding": "shard",
    "draw_array": "array_picture",
    "fill_params": "shard",
    "init_params": "shard",
    "initialize": "cluster",
    "inspect_program": "report",
    "latest_checkpoint": "checkpoint",
    "make_mesh": "mesh",
    "make_rules": "rules",
    "param_shardings": "shard",
    "parse_mesh": "mesh",
    "restore_params": "checkpoint",
    "shard_params": "shard",
    "unpad_params": "shard",
    "use": "rules",
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: command lines answer before JAX is there.
    if name not in _HOMES:
        raise AttributeError(f"module 'parallel' has no attribute {name!r}")
    importlib.import_module("parallel.rules")  # with it, from_hf(path, mesh=mesh) needs no rules spelled out
    return getattr(importlib.import_module(f"parallel.{_HOMES[name]}"), name)

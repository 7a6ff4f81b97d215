"""Where arrays live: meshes, the rules that lay logical axes on them, sharded parameters and checkpoints.

mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
rules = parallel.make_rules(mesh)
params = parallel.init_params(model, jax.random.key(0), rules)
with parallel.use(rules):
    out = jax.jit(model.apply)({"params": params}, input_ids=ids)
"""

import importlib
from typing import TYPE_CHECKING, Any

import modelzoo.hf
from parallel.cluster import initialize
from parallel.host import prepare_collectives
from parallel.mesh import MESH_AXES, make_mesh, parse_mesh
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

if TYPE_CHECKING:
    from parallel.checkpoint import latest_checkpoint, restore_params
    from parallel.report import ProgramReport, inspect_program

prepare_collectives()
modelzoo.hf.default_rules = make_rules  # so that from_hf(path, mesh=mesh) needs no rules spelled out

__all__ = [
    "MESH_AXES",
    "ProgramReport",
    "Rules",
    "abstract_sharded_params",
    "batch_sharding",
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


_LATE = {
    "latest_checkpoint": "parallel.checkpoint",
    "restore_params": "parallel.checkpoint",
    "ProgramReport": "parallel.report",
    "inspect_program": "parallel.report",
}
"""What few need, and what takes its time to import: Orbax, rich."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'parallel' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)

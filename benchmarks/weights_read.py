"""Bytes of weights that a decode step reads for one token, compiled for a TPU slice: int8 beside bfloat16.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.weights_read --topology v5e:2x2 --preset gpt-j-6b

Needs the TPU compiler (pip install "jax[tpu]") and no TPU. What is counted is what the program's instructions take of
its arguments from the chip's main memory: an argument that two instructions read counts twice. A table whose rows are
looked up counts as nothing; one that the head is tied to counts for the lookup as well, in both programs, so trust the
ratio of untied models. What a program writes and reads again (copies into another layout) is not in the figures.
"""

import argparse
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import modelzoo
import parallel
from inference.forward import decode_step
from modelzoo import quantizing
from parallel.collectives import bytes_of
from parallel.hlo import Instruction, Program
from parallel.shard import _unstack_targets

SLOTS = 256


def argument_reads(text: str) -> dict[int, int]:
    """Bytes read of each argument of a compiled program, by number.

    Args:
        text: from `compiled.as_text()`.
    """
    program = Program(text)
    entry = program.computations[program.entry].instructions
    alias = {}  # instruction -> the argument that it merely renames
    for name, at in entry.items():
        if at.opcode == "parameter":
            alias[name] = int(at.arguments)
        elif at.opcode in ("bitcast", "reshape") and at.operands[0] in alias:
            alias[name] = alias[at.operands[0]]
    reads = dict.fromkeys(alias.values(), 0)
    for name, at in entry.items():
        if name in alias or at.opcode == "tuple":
            continue
        for operand in at.operands:
            if operand in alias:
                reads[alias[operand]] += _read_by(at, entry[operand])
    return reads


def _read_by(reader: Instruction, argument: Instruction) -> int:
    """Of an argument: all of it, or the slice that is fetched."""
    arrays = reader.arrays if "slice-start" in reader.opcode else argument.arrays
    sizes = [bytes_of(dtype, shape) for dtype, shape in arrays]
    return min(sizes[:2]) if "slice-start" in reader.opcode else sum(sizes)


def weights_read(model: Any, rules: parallel.Rules, batch: int, quantize: bool) -> tuple[int, Any]:
    """Compiles the step; returns the bytes of weights that one device reads, and the program."""
    params = _unstack_targets(parallel.abstract_sharded_params(model, rules))
    if quantize:
        params = quantizing.quantize_params(model, params)
    whole, heads = rules.sharding(()), rules.sharding((None, "act_heads", None, None))
    with parallel.use(rules):
        cache = jax.eval_shape(lambda: modelzoo.unstack_layers(model.init_cache(batch, SLOTS)))
        cache = jax.tree.map(lambda leaf: leaf.update(sharding=heads if leaf.ndim == 4 else whole), cache)
        ids = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=whole)
        step = jax.jit(lambda *args: decode_step(model, *args), donate_argnums=3, keep_unused=True)
        compiled = step.lower(params, ids, ids, cache).compile()
    table = None if quantizing.tied_table(model) else params["trunk"]["embed"]["embedding"]
    reads = argument_reads(compiled.as_text() or "")
    leaves = jax.tree.leaves(params)
    return sum(reads.get(i, 0) for i, leaf in enumerate(leaves) if leaf is not table), compiled


def main() -> None:
    """Compiles both programs and prints the ratio."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2", help="default: v5e:2x2")
    parser.add_argument("--preset", default="gpt-j-6b", help="default: gpt-j-6b")
    parser.add_argument("--layers", type=int, help="of the preset; default: all")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    arguments = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    rules = parallel.make_rules(parallel.make_mesh(tensor=-1, devices=list(devices)))
    layers = {"n_layer": arguments.layers} if arguments.layers else {}
    config = modelzoo.get_config(arguments.preset, **layers)
    family = modelzoo.get_family(config.model_type)
    model_class = next(cls for cls in family.classes if cls.task == "causal_lm")
    model = model_class(config, jnp.bfloat16, jnp.bfloat16)
    found = {}
    for name, quantize in (("bfloat16", False), ("int8", True)):
        found[name], compiled = weights_read(model, rules, arguments.batch, quantize)
        memory: Any = compiled.memory_analysis()
        print(
            f"{name:9} {found[name] / 2**20:10.1f} MiB of weights read by each chip for a token; "
            f"temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB"
        )
    print(f"ratio {found['int8'] / found['bfloat16']:.3f} (on {math.prod(rules.mesh.shape.values())} chips)")


if __name__ == "__main__":
    main()

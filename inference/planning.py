"""Decoding planned on chips that are not here: what arithmetic says, and what the TPU compiler makes of it.

Prefill and decode step are those of `inference.forward`, which the decode loop calls; parameters are shapes alone, laid
out as `inference.prepare` lays them. Where the cache lies, the compiled prefill says.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

import modelzoo
import parallel
from inference.decode_cost import DecodeCost, Request
from inference.forward import decode_step, prefill
from modelzoo import quantizing
from parallel import topology as places
from parallel.chips import Topology
from parallel.flops import count_flops
from parallel.hlo import Program
from parallel.layouts import describe, parse_layout
from parallel.plan_page import Compiled, Plan, Sent
from parallel.report import inspect_program
from parallel.shard import abstract_unstacked_params

PARAMETERS, CACHE = "parameters", "cache"


class Planner:
    """Plans the decoding of one model.

    Args:
        model: a causal language model.
        dtype: of parameters, activations and cache.
        rows: B.
        prompt, new: tokens of a prompt, and after it.
        quantize: "int8" or None.
        int8_cache: keys and values in int8.

    Raises:
        ValueError: the model does not generate so, or not so many tokens.
    """

    def __init__(
        self,
        model: modelzoo.Model,
        *,
        dtype: str = "bfloat16",
        rows: int = 1,
        prompt: int = 1024,
        new: int = 1024,
        quantize: str | None = None,
        int8_cache: bool = False,
    ):
        if model.task != "causal_lm":
            others = modelzoo.registry.relatives(type(model), ("causal_lm",))
            raise ValueError(
                f"{type(model).__name__} is no causal language model, which is what is planned here: take {others}"
            )
        limit, slots = model.config.max_positions, prompt + new
        if limit is not None and slots > limit:
            raise ValueError(
                f"--prompt {prompt} and --new {new} make {slots}, past the model's {limit} positions"
            )
        width = jnp.dtype(dtype).itemsize
        cache_dtype = jnp.int8 if int8_cache else None
        self.model: Any = type(model)(
            model.config, jnp.dtype(dtype), jnp.dtype(dtype), cache_dtype=cache_dtype
        )
        self.request = Request(rows, prompt, slots, width, quantize, 1 if int8_cache else width)

    def plan(self, topology: Topology, layout: str | None = None, compile: bool = True) -> Plan:
        """The plan on a topology.

        Args:
            topology: of the chips.
            layout: the mesh, as `parallel.layouts` reads it; None splits heads as far as they divide.
            compile: ask the TPU compiler, if there is one.

        Raises:
            ValueError: the mesh does not fit the topology or the model.
        """
        sizes = self._usual(topology) if layout is None else parse_layout(layout).sizes
        mesh = places.abstract_mesh(topology, sizes)
        rules = self._rules(mesh)
        request = self._filled(rules)
        cost = DecodeCost(self.model, rules, request, topology)
        why = places.why_not_compiled(topology) if compile else ""
        compiled = None if why or not compile else self._compile(topology, sizes)
        if isinstance(compiled, str):
            compiled, why = None, compiled
        first, step = cost.prefill(), cost.step()
        kept = f"{jnp.dtype(self.model.param_dtype).name}{', kernels in int8' if request.quantize else ''}"
        name = f"{type(self.model).__name__}, {modelzoo.num_params(self.model):,} parameters in {kept}"
        cache = "int8" if request.cache_width == 1 else jnp.dtype(self.model.dtype).name
        per_token = cost.cache_bytes() * topology.size / request.rows / request.slots
        return Plan(
            title=(
                f"decode step of {name}: {request.rows} rows, {request.prompt} tokens of prompt, "
                f"{request.slots} slots, cache in {cache}"
            ),
            layout=describe(rules),
            forecast=step,
            memory=cost.memory(),
            messages=[
                Sent("all-reduce", (axis,), None, sent, "activations")
                for axis, sent in step.phases[0].network.items()
            ],
            compiled=compiled,
            without=why,
            figures=(
                (
                    "prefill, predicted",
                    f"{first.seconds:.3g} s, {first.tokens_per_second:,.0f} tokens/s. {first.limit()}",
                ),
                ("each row, predicted", f"{1 / step.seconds:,.1f} tokens/s"),
                ("cache", f"{per_token:,.0f} bytes a token, on all chips together"),
            ),
        )

    def _usual(self, topology: Topology) -> dict[str, int]:
        """All chips on tensor, as far as heads divide; the rest on data."""
        heads = self.model.config.cache_heads[0]
        tensor = max(n for n in places.divisors(topology.size) if heads % n == 0)
        return {"tensor": tensor, "data": topology.size // tensor}

    def _filled(self, rules: parallel.Rules) -> Request:
        """The request with as many rows as the mesh divides: `generate` fills a batch up."""
        shards = rules.num_shards("act_batch")
        return dataclasses.replace(self.request, rows=-(-self.request.rows // shards) * shards)

    def _rules(self, mesh: Any) -> parallel.Rules:
        rules = parallel.make_rules(mesh).for_decoding()
        parallel.param_shardings(self.model, rules)
        return rules

    def _compile(self, topology: Topology, sizes: Any) -> Compiled | str:
        begun, model = time.perf_counter(), self.model
        rules = self._rules(parallel.make_mesh(**sizes, devices=places.tpu_devices(topology)))
        request = self._filled(rules)
        params = abstract_unstacked_params(model, rules)
        if request.quantize:
            params = quantizing.quantize_params(model, params)
        batch = parallel.batch_sharding(rules)

        def rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((request.rows, *shape), dtype, sharding=batch)

        def first(params: Any, ids: Any, mask: Any) -> Any:
            return prefill(model, params, ids, mask, request.slots)

        def step(params: Any, tokens: Any, positions: Any, cache: Any) -> Any:
            logits, cache = decode_step(model, params, tokens, positions, cache)
            return jnp.argmax(logits, axis=-1), cache

        try:
            with parallel.use(rules):
                ids, mask = rows(request.prompt), rows(request.prompt, dtype=jnp.bool_)
                begin: Any = jax.jit(first).lower(params, ids, mask).compile()
                shapes = jax.eval_shape(first, params, ids, mask)[2]
                cache = jax.tree.map(
                    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                    shapes,
                    begin.output_shardings[2],
                )
                program: Any = jax.jit(step, donate_argnums=3).lower(params, rows(), rows(), cache).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return (
                f"The compiler finds no way to fit it: {str(error).partition(chr(10))[0].partition(': ')[2]}"
            )
        report = inspect_program(
            program, rules.mesh, lambda path: CACHE if path.startswith("3") else PARAMETERS
        )
        assert report.memory is not None
        memory, start = program.memory_analysis(), begin.memory_analysis()
        # The prefill's parameters are the step's; its results are the cache.
        more = start.temp_size_in_bytes - memory.temp_size_in_bytes
        return Compiled(
            arguments={name: report.memory.arguments.get(name, 0) for name in (PARAMETERS, CACHE)},
            argument_size_in_bytes=memory.argument_size_in_bytes,
            temp_size_in_bytes=memory.temp_size_in_bytes + max(0, more),
            output_size_in_bytes=memory.output_size_in_bytes,
            alias_size_in_bytes=memory.alias_size_in_bytes,
            generated_code_size_in_bytes=memory.generated_code_size_in_bytes,
            flops=count_flops(Program(program.as_text())),
            sent=[Sent(g.kind, g.axes, g.count, g.bytes_sent, g.module, g.crosses) for g in report.grouped()],
            seconds=time.perf_counter() - begun,
            compiler=places.compiler(),
            peak_memory_in_bytes=max(getattr(one, "peak_memory_in_bytes", 0) for one in (memory, start)),
        )

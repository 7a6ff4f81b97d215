"""One process of a cluster, as tests/test_cluster.py starts them: a few training steps, their losses as JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import modelzoo
import parallel
import train
from train.data.batches import batch_shard

ROWS, LENGTH = 8, 16


def run(mesh: dict[str, int], num_steps: int) -> dict[str, list[float]]:
    """Trains a small GPT-J; each process feeds its own rows of the batch."""
    config = modelzoo.get_config("tiny-gptj", n_layer=1, resid_pdrop=0.1)
    model = modelzoo.GPTJForCausalLM(config, dtype=jnp.float32)
    rules = parallel.make_rules(parallel.make_mesh(**mesh))
    optimizer = optax.adamw(3e-3)
    state = train.init_state(model, optimizer, rules=rules, rng=jax.random.key(1))
    step = train.make_train_step(model, optimizer, rules=rules)
    index, count = batch_shard(parallel.batch_sharding(rules), ROWS)
    mine = slice(index * ROWS // count, (index + 1) * ROWS // count)
    reports = []
    for number in range(num_steps):
        ids = np.random.default_rng(number).integers(config.vocab_size, size=(ROWS, LENGTH), dtype=np.int32)[
            mine
        ]
        state, metrics = step(state, {"input_ids": ids, "labels": ids})
        reports.append(metrics)
    return {name: [float(report[name]) for report in reports] for name in ("loss", "grad_norm")}


def main() -> None:
    """Joins the cluster of the environment and prints what `run` of the given mesh and steps returns."""
    parallel.initialize(timeout=60)
    found = run(parallel.parse_mesh(sys.argv[1]), int(sys.argv[2]))
    who = {"process": jax.process_index(), "processes": jax.process_count(), "devices": jax.device_count()}
    print(json.dumps(who | found))


if __name__ == "__main__":
    main()

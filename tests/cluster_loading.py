"""One process of a cluster, as tests/test_loading.py starts them: loads a checkpoint in int8, tells what it read."""

import json
import sys

import jax
import numpy as np

import parallel
from inference.loading import open_checkpoint
from modelzoo import tensor_files


def main() -> None:
    """Loads FOLDER onto MESH; prints the bytes read of it and the sums of what lies on this process's devices."""
    parallel.initialize(timeout=60)
    counts, read = [], tensor_files.Reader.read

    def counting(self, file, offset, count, dtype):
        counts.append(count * dtype.itemsize)
        return read(self, file, offset, count, dtype)

    tensor_files.Reader.read = counting
    tensor_files.GAP_BYTES = 0
    rules = parallel.make_rules(parallel.make_mesh(**parallel.parse_mesh(sys.argv[2])))
    params = open_checkpoint(sys.argv[1], "float32").read_prepared(rules, "int8")
    shards = [shard for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    sums = [float(np.sum(np.abs(np.asarray(shard.data, np.float64)))) for shard in shards]
    held = sum(shard.data.nbytes for shard in shards)
    print(json.dumps(dict(process=jax.process_index(), read=sum(counts), held=held, sums=sums)))


if __name__ == "__main__":
    main()

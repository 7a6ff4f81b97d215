"""How much host memory loading a checkpoint takes: the peak over the level before it, as a ratio to the checkpoint.

    python benchmarks/load_memory.py [--gigabytes 2] [--layouts fsdp=8 ...]

Makes a random float32 GPT-J checkpoint in a temporary folder and loads it in a fresh process per layout, onto 8
simulated CPU devices; with transformers installed, loads it there too. The loaded parameters themselves are in the
figure: 1.0 is the least that is possible. Linux only (/proc).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYOUTS = ["single", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2", "stage=2,fsdp=4", "transformers"]
# Prints what a process had before, at its peak, and how long the load took; the peak is reset first (clear_refs 5).
MEASURE = """
import json, sys, time
def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
folder, layout = sys.argv[1:]
if layout == "transformers":
    import torch, transformers
    def load(): return transformers.GPTJForCausalLM.from_pretrained(folder)
else:
    import jax, modelzoo, parallel
    sizes = {} if layout == "single" else {k: int(v) for k, v in (item.split("=") for item in layout.split(","))}
    mesh = parallel.make_mesh(**sizes) if sizes else None
    jax.block_until_ready(jax.device_put(0.0))
    def load(): return jax.block_until_ready(modelzoo.from_hf(folder, mesh=mesh)[1])
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")
before, start = status("VmRSS"), time.perf_counter()
loaded = load()
print(json.dumps(dict(before=before, peak=status("VmHWM"), after=status("VmRSS"), seconds=time.perf_counter() - start)))
"""


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes a GPT-J checkpoint of about that size, random float32; returns the bytes of its tensors."""
    import jax
    import numpy as np

    import modelzoo

    width, vocab = 2048, 50400
    per_layer = 12 * width * width * 4
    layers = max(1, round((gigabytes * 1e9 - 2 * vocab * width * 4) / per_layer))
    config = modelzoo.GPTJConfig(vocab_size=vocab, n_embd=width, n_layer=layers, n_head=16, rotary_dim=64)
    model = modelzoo.GPTJForCausalLM(config)
    rng = np.random.default_rng(0)
    shapes = modelzoo.abstract_params(model)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    modelzoo.to_hf(model, params, folder, max_shard_size="1GB")
    return sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))


def main() -> None:
    """Measures every layout and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: 2)")
    parser.add_argument(
        "--layouts", nargs="+", default=LAYOUTS, help=f"which to load onto (default: {LAYOUTS})"
    )
    arguments = parser.parse_args()
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root))
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        # Made in a process of its own: what it takes must not be inherited as anybody's peak.
        code = (
            f"import sys; sys.path.insert(0, 'benchmarks'); import load_memory as m; "
            f"print(m.make_checkpoint(m.Path({folder!r}), {arguments.gigabytes}))"
        )
        made = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=root, check=True, capture_output=True, text=True
        )
        nbytes = int(made.stdout)
        print(f"checkpoint: {nbytes / 1e9:.2f} GB float32, written in {time.perf_counter() - start:.1f} s")
        print(f"{'layout':28} {'peak / checkpoint':>18} {'held / checkpoint':>18} {'GB/s':>7}")
        for layout in arguments.layouts:
            if layout == "transformers" and not importlib.util.find_spec("transformers"):
                continue
            command = [sys.executable, "-c", MEASURE, folder, layout]
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            peak, held = ((figures[key] - figures["before"]) / nbytes for key in ("peak", "after"))
            print(
                f"{layout:28} {peak:18.3f} {held:18.3f} {nbytes / 1e9 / figures['seconds']:7.2f}", flush=True
            )


if __name__ == "__main__":
    main()

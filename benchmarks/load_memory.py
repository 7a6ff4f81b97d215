"""How much host memory loading a checkpoint takes: the peak over the level before, by the checkpoint's size.

    python benchmarks/load_memory.py [--gigabytes 2] [--layouts single fsdp=8 ...]

Makes a random float32 GPT-J checkpoint in a temporary folder, and loads it in a fresh process per layout
onto 8 simulated CPU devices. Where transformers is installed it loads the same folder too, and reads every
parameter once, since it maps safetensors and would otherwise not have them. The parameters themselves are in
the figures, so 1.0 is the least that is possible; "+layers" reads every layer as a tree of its own, as decoding
wants it, and "+int8" turns kernels into int8 on the way, which leaves a third to be held. Linux only (/proc).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = ["single", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2", "stage=2,fsdp=4", "transformers"]
LAYOUTS[5:5] = ["single+layers", "single+int8", "fsdp=2,tensor=4+int8"]
WIDTH, VOCAB = 2048, 50400

MAKE = """
import sys, jax, numpy as np, modelzoo
folder, width, vocab, layers = sys.argv[1], *map(int, sys.argv[2:])
config = modelzoo.GPTJConfig(vocab_size=vocab, n_embd=width, n_layer=layers, n_head=16, rotary_dim=64)
model = modelzoo.GPTJForCausalLM(config)
rng = np.random.default_rng(0)
params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), modelzoo.abstract_params(model))
modelzoo.to_hf(model, params, folder, max_shard_size="1GB")
"""

# The peak that a process inherits from its start is reset by writing 5 to clear_refs.
MEASURE = """
import json, sys
def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
folder, layout = sys.argv[1:]
if layout == "transformers":
    import torch, transformers
    def load():
        model = transformers.GPTJForCausalLM.from_pretrained(folder)
        return model, [parameter.sum().item() for parameter in model.parameters()]
else:
    import jax, modelzoo, parallel
    layout, _, form = layout.partition("+")
    options = dict(unstack=bool(form), quantize="int8" if form == "int8" else None)
    axes = {} if layout == "single" else dict(axis.split("=") for axis in layout.split(","))
    mesh = parallel.make_mesh(**{axis: int(size) for axis, size in axes.items()}) if axes else None
    jax.block_until_ready(jax.device_put(0.0))
    def load():
        return jax.block_until_ready(modelzoo.from_hf(folder, mesh=mesh, **options)[1])
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")
before = status("VmRSS")
loaded = load()
print(json.dumps(dict(before=before, peak=status("VmHWM"), after=status("VmRSS"))))
"""


def run(code: str, *arguments: object) -> str:
    """What a program prints that runs in a process of its own, where 8 devices are simulated."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Measures every layout and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: 2)")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help=f"default: {' '.join(LAYOUTS)}")
    arguments = parser.parse_args()
    layers = max(1, round((arguments.gigabytes * 1e9 - 2 * VOCAB * WIDTH * 4) / (12 * WIDTH * WIDTH * 4)))
    with tempfile.TemporaryDirectory() as folder:
        run(MAKE, folder, WIDTH, VOCAB, layers)
        nbytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        print(f"checkpoint: {nbytes / 1e9:.2f} GB float32, {layers} layers")
        print(f"{'layout':28} {'peak / checkpoint':>18} {'held / checkpoint':>18}")
        for layout in arguments.layouts:
            if layout == "transformers" and not importlib.util.find_spec("transformers"):
                continue
            figures = json.loads(run(MEASURE, folder, layout).splitlines()[-1])
            peak, held = ((figures[key] - figures["before"]) / nbytes for key in ("peak", "after"))
            print(f"{layout:28} {peak:18.3f} {held:18.3f}", flush=True)


if __name__ == "__main__":
    main()

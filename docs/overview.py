"""Draws docs/images/overview.png: a quickstart run's loss, and where a block's kernels lie on a mesh.

make quickstart && XLA_FLAGS=--xla_force_host_platform_device_count=8 python docs/overview.py
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import modelzoo
import parallel

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("#3566a8", "#7fa6d6", "#d1662b", "#eeb48a")


def draw_loss(axes: plt.Axes) -> None:
    """The curve of runs/quickstart."""
    lines = [json.loads(line) for line in (ROOT / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o--")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), style, label=label, color=COLOURS[2 * (name == "eval_loss")])
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="make quickstart")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_kernel(axes: plt.Axes, name: str, parameter: object, first: str, second: str) -> None:
    """Which devices hold which part of one layer's kernel [in, out]."""
    spec = parameter.sharding.spec  # type: ignore[attr-defined]
    names = [axis if axis in ("fsdp", "tensor") else None for axis in spec[1:]]
    rows, columns = (
        2 if axis else 1 for axis in (names[0], next((axis for axis in names[1:] if axis), None))
    )
    for row in range(rows):
        for column in range(columns):
            height, width = 1 / rows, 1 / columns
            corner = (column * width, 1 - (row + 1) * height)
            colour = COLOURS[2 * row + column]
            axes.add_patch(plt.Rectangle(corner, width, height, facecolor=colour, edgecolor="white", lw=3))
            place = dict(zip((first, second), (row, column), strict=True))
            text = "\n".join(f"{axis} {index}" for axis, index in place.items())
            centre = corner[0] + width / 2, corner[1] + height / 2
            axes.text(*centre, text, ha="center", va="center", color="white", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    axes.set_title(name, fontsize=9)
    axes.spines[:].set_visible(False)


def main() -> None:
    """Draws and writes the picture."""
    rules = parallel.make_rules(parallel.make_mesh(data=2, fsdp=2, tensor=2))
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("gpt-j-6b"))
    layers = parallel.abstract_sharded_params(model, rules)["trunk"]["layers"]
    figure = plt.figure(figsize=(11, 4), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    draw_loss(left.add_subplot())
    right.suptitle("GPT-J-6B's kernels on data 2 x fsdp 2 x tensor 2", fontsize=11)
    grid = right.subplots(2, 2)
    attention, mlp = layers["attention"], layers["mlp"]
    cells = (
        ("query, key, value [embed, heads]", attention["query"]["kernel"], "fsdp", "tensor"),
        ("out [heads, embed]", attention["out"]["kernel"], "tensor", "fsdp"),
        ("fc_in [embed, mlp]", mlp["fc_in"]["kernel"], "fsdp", "tensor"),
        ("fc_out [mlp, embed]", mlp["fc_out"]["kernel"], "tensor", "fsdp"),
    )
    for axes, (name, parameter, first, second) in zip(np.ravel(grid), cells, strict=True):
        draw_kernel(axes, name, parameter, first, second)
    figure.savefig(ROOT / "docs/images/overview.png")


if __name__ == "__main__":
    main()

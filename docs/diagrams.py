"""Draws the diagrams of docs/concepts.md: `python docs/diagrams.py` writes docs/images/*.svg.

Those of the mesh and of the rules are computed, not drawn by hand: they show what `parallel` does on eight devices.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

import modelzoo
import parallel

FOLDER = Path(__file__).parent / "images"
INK, FAINT, PAPER = "#1f2933", "#7b8794", "#ffffff"
BLUE, GREEN, AMBER, ROSE, GREY = "#dbe9f6", "#dff0e1", "#fdecc8", "#f9dede", "#eef1f4"
DEVICES = ["#c6dbef", "#9ecae1", "#c7e9c0", "#a1d99b", "#fdd0a2", "#fdae6b", "#dadaeb", "#bcbddc"]

matplotlib.rcParams.update({"svg.hashsalt": "flaxtron", "svg.fonttype": "path", "font.family": "DejaVu Sans"})


def canvas(width: float, height: float) -> Any:
    """Axes in units of a tenth of an inch, without a frame, on white paper (pages may be dark)."""
    figure = plt.figure(figsize=(width / 10, height / 10), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def box(
    axes: Any, x: float, y: float, w: float, h: float, text: str = "", color: str = GREY, size: float = 9
) -> None:
    """A rounded box with a text in its middle."""
    style = "round,pad=0,rounding_size=0.8"
    axes.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=color, edgecolor=FAINT, linewidth=0.8)
    )
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.4)


def arrow(
    axes: Any,
    start: Sequence[float],
    end: Sequence[float],
    text: str = "",
    above: float = 1.2,
    bend: float = 0.0,
) -> None:
    """An arrow, with a text over its middle."""
    line = dict(
        arrowstyle="-|>", color=FAINT, linewidth=1.1, shrinkA=0, shrinkB=0, connectionstyle=f"arc3,rad={bend}"
    )
    axes.annotate("", xy=end, xytext=start, arrowprops=line)
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above
        axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=FAINT)


def note(axes: Any, x: float, y: float, text: str, size: float = 8, **options: Any) -> None:
    """A text by itself."""
    axes.text(
        x,
        y,
        text,
        **{"ha": "left", "va": "center", "fontsize": size, "color": INK, "linespacing": 1.4, **options},
    )


def save(axes: Any, name: str) -> None:
    """Writes the picture; the same bytes each time."""
    axes.figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(axes.figure)


def parts(shape: Sequence[int], sharding: Any) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """{the bounds of a part of an array: the devices that hold it}."""
    found: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for device, index in sharding.devices_indices_map(tuple(shape)).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        found.setdefault(bounds, []).append(device.id)
    return found


def draw_matrix(
    axes: Any, x: float, y: float, w: float, h: float, shape: Sequence[int], sharding: Any
) -> None:
    """A matrix cut as its sharding cuts it, each part with the numbers of its devices."""
    for (rows, columns), devices in parts(shape, sharding).items():
        left, width = x + w * columns[0] / shape[1], w * (columns[1] - columns[0]) / shape[1]
        height = h * (rows[1] - rows[0]) / shape[0]
        top = y + h - h * rows[0] / shape[0]
        axes.add_patch(
            Rectangle(
                (left, top - height),
                width,
                height,
                facecolor=DEVICES[devices[0]],
                edgecolor=PAPER,
                linewidth=1.5,
            )
        )
        note(axes, left + width / 2, top - height / 2, " ".join(map(str, sorted(devices))), ha="center")


def mesh() -> None:
    """Eight devices as data=2, fsdp=2, tensor=2, and where three arrays lie on them."""
    grid = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    rules = parallel.make_rules(grid)
    axes = canvas(76, 25)
    numbers = grid.device_ids.reshape(2, 2, 2)
    for d in range(2):
        for f in range(2):
            for t in range(2):
                number = int(numbers[d, f, t])
                box(axes, 4 + 12 * d + 5.2 * t, 12 - 5.2 * f, 4.6, 4.6, str(number), DEVICES[number], 10)
        note(axes, 9.4 + 12 * d, 18.2, f"data {d}", ha="center", color=FAINT)
    note(axes, 3.4, 14.3, "fsdp 0", ha="right", size=7, color=FAINT)
    note(axes, 3.4, 9.1, "fsdp 1", ha="right", size=7, color=FAINT)
    for d in range(2):
        for t in range(2):
            note(axes, 6.3 + 12 * d + 5.2 * t, 5.3, f"tensor {t}", ha="center", size=6.5, color=FAINT)
    note(axes, 15, 22.6, "make_mesh(data=2, fsdp=2, tensor=2)", ha="center", size=9)
    for i, (title, names, shape) in enumerate(
        (
            ("an MLP's kernel", ("embed", "mlp"), (8, 8)),
            ("a norm's scale", ("embed",), (8,)),
            ("a batch of activations", ("act_batch", "act_mlp"), (8, 8)),
        )
    ):
        x = 31 + 15.5 * i
        full = shape if len(shape) == 2 else (*shape, 1)
        sharding = rules.sharding(names) if len(names) == 2 else rules.sharding((*names, None))
        draw_matrix(axes, x, 7, 12.5 if len(shape) == 2 else 4, 10, full, sharding)
        note(axes, x, 22.6, title, size=9)
        note(axes, x, 19.6, "[" + ", ".join(names) + "]", size=7.5, color=FAINT)
        spec = ", ".join(
            "+".join(part) if isinstance(part, tuple) else str(part) for part in rules.spec(names)
        )
        note(axes, x, 4.6, f"cut by {spec}", size=7.5, color=FAINT)
    note(axes, 31, 1.8, "numbers in a part: the devices that hold it", size=7.5, color=FAINT)
    save(axes, "mesh")


def rules() -> None:
    """From a layer's names by way of the table to a device's shard."""
    table = parallel.make_rules(parallel.make_mesh(data=2, fsdp=2, tensor=2))
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("gpt-j-6b"))
    kernel = parallel.abstract_sharded_params(model, table)["trunk"]["layers"]["mlp"]["fc_in"]["kernel"]
    axes = canvas(76, 20)
    box(axes, 1, 5, 17, 10, 'modelzoo: the layer\n\nkernel has axes\n("embed", "mlp")', BLUE)
    box(
        axes,
        23,
        3,
        17,
        14,
        "parallel/rules.py\n\nembed → fsdp\nmlp → tensor\nact_batch → data, fsdp\n...",
        AMBER,
    )
    box(axes, 45, 5, 13, 10, "a sharding\n\nP(fsdp, tensor)", GREEN)
    shape = kernel.sharding.shard_shape(kernel.shape)[1:]
    box(
        axes,
        63,
        5,
        12,
        10,
        f"on a device\n\n{shape[0]} x {shape[1]}\nof {kernel.shape[1]} x {kernel.shape[2]}",
        GREY,
    )
    for start, end in ((18, 23), (40, 45), (58, 63)):
        arrow(axes, (start, 10), (end, 10))
    note(axes, 9.5, 2.6, "knows no mesh", ha="center", color=FAINT)
    note(axes, 31.5, 1.2, "the only place that knows both", ha="center", color=FAINT)
    note(axes, 51.5, 2.6, "jax.sharding", ha="center", color=FAINT)
    note(axes, 69, 2.6, "GPT-J-6B, each layer", ha="center", color=FAINT)
    save(axes, "rules")


def cache() -> None:
    """Prefill fills slots, each step adds one, and the cache doubles when it is full."""
    axes = canvas(76, 26)
    rows = (
        (20, 8, "init_cache", [0, 0, 8]),
        (14, 8, "prefill: one pass over the prompt", [5, 0, 3]),
        (8, 8, "decode: a pass for each token", [5, 3, 0]),
        (2, 16, "full: twice the slots, decode goes on", [5, 5, 6]),
    )
    for y, slots, text, counts in rows:
        kinds = [BLUE] * counts[0] + [GREEN] * counts[1] + [PAPER] * counts[2]
        for i in range(slots):
            axes.add_patch(
                Rectangle((1 + 2.8 * i, y), 2.5, 3.2, facecolor=kinds[i], edgecolor=FAINT, linewidth=0.8)
            )
        used = counts[0] + counts[1]
        note(axes, 49, y + 1.6, text)
        if used < slots:
            axes.annotate(
                "",
                xy=(2.2 + 2.8 * used, y + 3.3),
                xytext=(2.2 + 2.8 * used, y + 5),
                arrowprops=dict(arrowstyle="-|>", color=INK),
            )
    note(axes, 25, 24.2, "prompt", bbox=dict(facecolor=BLUE, edgecolor=FAINT, linewidth=0.6))
    note(axes, 31.5, 24.2, "new tokens", bbox=dict(facecolor=GREEN, edgecolor=FAINT, linewidth=0.6))
    note(axes, 40.5, 24.2, "↓ the next slot", color=INK)
    save(axes, "cache")


def step() -> None:
    """One training step: what goes in, what comes out, and what may be exchanged."""
    axes = canvas(76, 30)
    box(axes, 20, 3, 39, 24, "", "#f7f9fb")
    note(axes, 21.5, 25, "one jitted function: make_train_step(model, optimizer, mesh=...)", size=8)
    box(axes, 1, 17, 13, 6.5, "batch\ninput_ids, labels", BLUE)
    box(axes, 1, 5, 13, 6.5, "state\nparams, optimizer,\nstep", AMBER, 8)
    box(axes, 22, 16, 10, 7, "forward\nmodel.apply", GREY)
    box(axes, 35, 16, 9, 7, "loss\nby class", GREY)
    box(axes, 47, 16, 10, 7, "gradients\nsummed over\nthe mesh", GREY, 8)
    box(axes, 41, 5, 16, 6.5, "optimizer: clip, update,\nskip what is no number", GREY, 8)
    box(axes, 63, 17, 12, 6.5, "metrics\nloss, tokens, norms", BLUE, 8)
    box(axes, 63, 5, 12, 6.5, "state\nof the next step", AMBER)
    arrow(axes, (14, 20.2), (22, 20.2))
    arrow(axes, (14, 9.5), (22, 17))
    arrow(axes, (32, 19.5), (35, 19.5))
    arrow(axes, (44, 19.5), (47, 19.5))
    arrow(axes, (52, 16), (52, 11.5))
    arrow(axes, (14, 7), (41, 7), "the old one's memory is reused (donated)", 1.0)
    arrow(axes, (57, 8.2), (63, 8.2))
    arrow(axes, (57, 20.2), (63, 20.2))
    arrow(axes, (69, 5), (7.5, 5), bend=-0.06)
    save(axes, "step")


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    for draw in (mesh, rules, cache, step):
        draw()

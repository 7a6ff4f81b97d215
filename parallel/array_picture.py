"""Pictures of how arrays lie on a mesh: which device holds which part.

    figure, axes = plt.subplots()
    parallel.draw_array(axes, state.params["trunk"]["layers"]["mlp"]["fc_in"]["kernel"])

Nothing is read from the array, so that an abstract one of any size will do (`parallel.abstract_sharded_params`).
"""

from collections.abc import Sequence
from typing import Any

from jax.sharding import NamedSharding

COLORS = ("#08519c", "#4292c6", "#9ecae1", "#c7e9c0", "#a63603", "#f16913", "#fdae6b", "#d9d9d9")
"""Of up to eight devices; more of them take a scale."""
MAX_NAMES = 64
"""Parts that are still wide enough for the numbers of their devices."""


def draw_array(
    axes: Any, array: Any, names: Sequence[str | None] | None = None, dims: tuple[int, int] | None = None
) -> None:
    """Draws an array as a rectangle, cut as its sharding cuts it; the numbers in a part are those of its devices.

    A part has the color of its first device, so that a device has one color in all pictures of a mesh. Of an array
    with more than two dimensions two are drawn, at index 0 of the others.

    Args:
        axes: matplotlib's.
        array: with `shape` and a NamedSharding as `sharding`: a jax.Array, or a jax.ShapeDtypeStruct.
        names: of its dimensions, for the labels.
        dims: the two to draw, as rows and columns; by default those that are cut, else the last ones.

    Raises:
        ValueError: it has no sharding by name, no dimension, or not those that are asked for.
    """
    shape, sharding = tuple(array.shape), array.sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            f"the array {shape} lies on no mesh: draw one with a NamedSharding, not a "
            f"{type(sharding).__name__}"
        )
    if not shape:
        raise ValueError("an array without dimensions has no parts to draw")
    if names is not None and len(names) != len(shape):
        raise ValueError(f"names = {tuple(names)}: the array {shape} has {len(shape)} dimensions")
    if dims is not None and not (len(dims) == 2 and all(0 <= dim < len(shape) for dim in dims)):
        raise ValueError(f"dims = {dims}: two of the {len(shape)} dimensions of the array {shape}, from 0")
    rows, columns = dims or _drawn(shape, sharding)
    parts = _parts(shape, sharding, rows, columns)
    mesh: Any = sharding.mesh
    devices = {device: i for i, device in enumerate(mesh.devices.flat)}
    for (top, bottom, left, right), owners in parts.items():
        numbers = sorted(devices[owner] for owner in owners)
        color = _color(numbers[0], len(devices))
        axes.fill(
            (left, right, right, left), (top, top, bottom, bottom), facecolor=color, edgecolor="white", lw=2
        )
        if len(parts) <= MAX_NAMES:
            place, ink = ((left + right) / 2, (top + bottom) / 2), _ink(color)
            axes.text(*place, _listed(numbers), ha="center", va="center", color=ink, fontsize=8)
    height, width = _size(shape, rows), _size(shape, columns)
    axes.set(
        xlim=(0, width), ylim=(height, 0), xticks=(0, width), yticks=(0, height) if rows is not None else ()
    )
    labels = [_label(dim, sharding, names) for dim in (columns, rows)]
    axes.set_xlabel(labels[0], labelpad=-8)
    axes.set_ylabel(labels[1], labelpad=-8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)


def _drawn(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[int | None, int]:
    """The dimensions to draw: of those that are cut the last two, filled up from the end; rows None of a vector."""
    if len(shape) == 1:
        return None, 0
    cut = [dim for dim in range(len(shape)) if _axes_of(dim, sharding)][-2:]
    whole = [dim for dim in reversed(range(len(shape))) if dim not in cut]
    first, second = sorted([*cut, *whole][:2])
    return first, second


def _parts(
    shape: tuple[int, ...], sharding: NamedSharding, rows: int | None, columns: int
) -> dict[tuple[int, int, int, int], list[Any]]:
    """(top, bottom, left, right) -> the devices that hold it."""
    found: dict[tuple[int, int, int, int], list[Any]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        ranges = [part.indices(dim)[:2] for part, dim in zip(index, shape, strict=True)]
        if any(start for dim, (start, _) in enumerate(ranges) if dim not in (rows, columns)):
            continue
        key = (*((0, 1) if rows is None else ranges[rows]), *ranges[columns])
        found.setdefault(key, []).append(device)  # pyright: ignore[reportArgumentType]
    return found


def _size(shape: tuple[int, ...], dim: int | None) -> int:
    return 1 if dim is None else shape[dim]


def _axes_of(dim: int, sharding: NamedSharding) -> list[str]:
    """The mesh axes of more than one device that a dimension is cut over."""
    entry = sharding.spec[dim] if dim < len(sharding.spec) else None
    over = (entry,) if isinstance(entry, str) else entry or ()
    return [axis for axis in over if sharding.mesh.shape[axis] > 1]


def _label(dim: int | None, sharding: NamedSharding, names: Sequence[str | None] | None) -> str:
    """Such as "embed over fsdp"."""
    if dim is None:
        return ""
    over = _axes_of(dim, sharding)
    name = (names[dim] if names else None) or ""
    return " ".join(filter(None, (name, f"over {' x '.join(over)}" if over else "")))


def _listed(numbers: list[int]) -> str:
    """Such as "0 2 4 6" in lines of four; of many devices the first, the second and the last."""
    if len(numbers) > 8:
        return f"{numbers[0]} {numbers[1]} ... {numbers[-1]}"
    lines = (numbers[i : i + 4] for i in range(0, len(numbers), 4))
    return "\n".join(" ".join(map(str, line)) for line in lines)


def _color(number: int, count: int) -> tuple[float, float, float]:
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if count <= len(COLORS):
        return to_rgb(COLORS[number])
    return colormaps["viridis"](number / (count - 1))[:3]


def _ink(color: tuple[float, float, float]) -> str:
    """What is readable on a color, by its luma."""
    red, green, blue = color
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"

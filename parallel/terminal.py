"""What command lines on meshes share: simulated devices, a mesh and a model from text, errors in one line."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import modelzoo
from modelzoo import errors
from parallel.host import prepare_collectives

if TYPE_CHECKING:
    from parallel.rules import Rules

_DEVICE_COUNT = "xla_force_host_platform_device_count"
_PREFERRED_TASKS = ("pretraining", "masked_lm", "seq2seq_lm", "causal_lm", "unshifted_lm")


def simulate_devices(count: int) -> None:
    """Makes the CPU look like so many devices, unless JAX_PLATFORMS or XLA_FLAGS say what to use.

    To be called before anything asks JAX for its devices.

    Args:
        count: how many.

    Raises:
        ValueError: it is below 1.
    """
    if count < 1:
        raise ValueError(f"{count} devices: there is at least 1")
    import jax  # here and below, not above: `--help` should answer at once

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if _DEVICE_COUNT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_DEVICE_COUNT}={count}".strip()
    prepare_collectives()


def rules_of(text: str) -> "Rules | None":
    """The rules of a layout that a person wrote, such as "data=2,tensor=2,sequence"; None for an empty text.

    A mesh of fewer devices than there are takes the first of them.

    Raises:
        ValueError: no such layout, or more devices than there are.
    """
    import jax

    from parallel.layouts import parse_layout
    from parallel.mesh import make_mesh
    from parallel.rules import make_rules

    layout = parse_layout(text)
    sizes: dict[str, Any] = dict(layout.sizes)
    if not sizes and not layout.variants:
        return None
    devices, count = jax.devices(), math.prod(sizes.values())
    if min(sizes.values(), default=1) > 0:
        devices = devices[:count]
    return make_rules(make_mesh(**sizes, devices=devices), **layout.variants)


def model_of(preset: str, model_class: str | None = None, fields: Sequence[str] = ()) -> Any:
    """A model, float32.

    Args:
        preset: such as "tiny-gptj".
        model_class: its class; None is the one that the family is pretrained as.
        fields: of the config, as "n_layer=4".

    Raises:
        ValueError: no such preset or field, or a class of another family.
    """
    changes = {}
    for text in fields:
        name, found, value = (part.strip() for part in text.partition("="))
        if not found:
            raise ValueError(f"{text!r} changes no field: write it as FIELD=VALUE, such as n_layer=4")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    config = modelzoo.get_config(preset, **changes)
    classes = {cls.__name__: cls for cls in modelzoo.get_family(config.model_type).classes}
    if model_class is None:
        by_task = {cls.task: name for name, cls in classes.items()}
        model_class = next(by_task[task] for task in _PREFERRED_TASKS if task in by_task)
    if model_class not in classes:
        raise ValueError(f"{model_class!r} is no class of {preset}, which has {', '.join(classes)}")
    return classes[model_class](config)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """As `modelzoo.errors.user_errors`; a reader that has enough, such as head, is no error."""
    with errors.user_errors():
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None

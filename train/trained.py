"""The part of a parameter tree that trains: gradients are taken of it alone, and summed over it alone."""

from typing import Any

import jax
import jax.numpy as jnp

import modelzoo


class Trained:
    """Splits trees by what training changes of a model.

    Args:
        model: says what (`modelzoo.trainable`).
    """

    def __init__(self, model: modelzoo.Model):
        self._trains = modelzoo.trainable(model)

    def of(self, tree: Any) -> Any:
        """The tree with None for what is frozen."""
        return jax.tree.map(lambda trains, leaf: leaf if trains else None, self._trains, tree)

    def join(self, trained: Any, whole: Any) -> Any:
        """The tree `whole` with what trains from `trained`."""
        return jax.tree.map(lambda trains, a, b: a if trains else b, self._trains, trained, whole)

    def filled(self, trained: Any, whole: Any) -> Any:
        """A tree like `whole`, zero where `trained` has nothing."""
        return self.join(trained, jax.tree.map(jnp.zeros_like, whole))

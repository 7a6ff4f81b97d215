import re

import jax
import numpy as np
import pytest

import modelzoo
from modelzoo import registry
from modelzoo.weights import Weight, WeightTable, bind, flatten, is_other_head, parse, unflatten

TABLE = WeightTable(
    prefix="net.",
    weights=(
        Weight("net.words", "embed.embedding", "v d -> v d", also=("head.weight",)),
        Weight("net.block.{}.qkv", ("layers.query", "layers.key", "layers.value"), "(n c h) d -> c d n h"),
        Weight("net.block.{}.scale", "layers.scale", "1 d -> d"),
        Weight("classes.weight", "classes.kernel", "c d -> d c"),
    ),
    ignored=(r"\.mask$",),
    renames=((r"gamma$", "scale"),),
)


def shapes(**leaves):
    return {
        tuple(path.split("__")): jax.ShapeDtypeStruct(shape, np.float32) for path, shape in leaves.items()
    }


TRUNK = dict(
    embed__embedding=(11, 6),
    layers__query=(2, 6, 4, 3),
    layers__key=(2, 6, 4, 3),
    layers__value=(2, 6, 4, 3),
    layers__scale=(2, 6),
)
BASE = shapes(**TRUNK)
HEAD = shapes(classes__kernel=(6, 5), **{f"trunk__{name}": shape for name, shape in TRUNK.items()})


def test_patterns():
    assert parse("(n c h) d -> c d n h") == ((("n", "c", "h"), ("d",)), ("c", "d", "n", "h"))
    assert parse("1 v -> v") == (((), ("v",)), ("v",))
    for wrong in ("a b -> a", "a -> a b", "a a -> a"):
        with pytest.raises(AssertionError, match="axis"):
            parse(wrong)


def test_flatten_and_back():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert unflatten(flatten(tree)) == tree


def test_bind_gives_names_shapes_and_places():
    tensors = {tensor.name: tensor for tensor in bind(TABLE, HEAD)}
    assert list(tensors) == [
        *("net.words", "net.block.0.qkv", "net.block.1.qkv", "net.block.0.scale", "net.block.1.scale"),
        "classes.weight",
    ]
    qkv = tensors["net.block.1.qkv"]
    assert (qkv.shape, qkv.layer, qkv.fused) == ((36, 6), 1, "c")
    assert qkv.paths == (
        ("trunk", "layers", "query"),
        ("trunk", "layers", "key"),
        ("trunk", "layers", "value"),
    )
    assert tensors["net.block.0.scale"].shape == (1, 6)
    assert tensors["net.words"].names == ("net.words", "words")
    assert tensors["net.words"].copies == ("head.weight",)
    assert tensors["classes.weight"].in_head
    assert not tensors["net.words"].in_head


def test_bind_of_the_bare_trunk_drops_the_prefix():
    tensors = bind(TABLE, BASE)
    assert tensors[0].names == ("words", "net.words")
    assert tensors[0].paths == (("embed", "embedding"),)
    assert len(tensors) == 5


def test_bind_notices_a_parameter_that_no_row_covers():
    with pytest.raises(AssertionError, match="forgotten"):
        bind(TABLE, BASE | shapes(forgotten=(3,)))


def test_a_class_that_lacks_a_part_may_name_a_tensor_otherwise():
    rows = (
        Weight("net.lone.words", "embed.embedding", "v d -> v d", without="encoder"),
        Weight("net.words", "embed.embedding", "v d -> v d"),
        Weight("net.encoder", "encoder.scale", "d -> d"),
    )
    table = WeightTable("net.", rows)
    whole = shapes(embed__embedding=(11, 6), encoder__scale=(6,))
    assert [tensor.name for tensor in bind(table, whole)] == ["words", "encoder"]
    lone = shapes(trunk__embed__embedding=(11, 6))
    assert [tensor.name for tensor in bind(table, lone)] == ["net.lone.words"]


def test_a_parameter_of_its_own_is_no_copy():
    head = Weight("head.weight", "head.kernel", "v d -> d v")
    table = WeightTable(TABLE.prefix, (*TABLE.weights, head))
    tied = {tensor.name: tensor for tensor in bind(table, HEAD)}
    assert tied["net.words"].copies == ("head.weight",)
    untied = {tensor.name: tensor for tensor in bind(table, HEAD | shapes(head__kernel=(6, 11)))}
    assert untied["net.words"].copies == ()


def test_names_that_are_written_where_nothing_is_tied():
    row = Weight("net.words", "embed.embedding", "v d -> v d", untied=("net.other",))
    (bare,) = bind(WeightTable("net.", (row,)), shapes(embed__embedding=(11, 6)))
    assert bare.written(ties=True) == ("words",)
    assert bare.written(ties=False) == ("words", "other")


def test_other_heads_are_told_from_strangers():
    assert is_other_head(TABLE, BASE, "classes.weight")
    assert not is_other_head(TABLE, HEAD, "classes.weight")
    assert not is_other_head(TABLE, BASE, "block.7.qkv")  # a layer too many is a stranger
    assert not is_other_head(TABLE, BASE, "classes.bias")


def test_renames_and_ignored():
    assert TABLE.rename("net.block.0.gamma") == "net.block.0.scale"
    assert TABLE.ignores("net.block.0.mask")
    assert not TABLE.ignores("net.block.0.masked")


@pytest.mark.parametrize(
    "cls",
    [cls for family in registry.FAMILIES.values() for cls in family.classes],
    ids=lambda cls: cls.__name__,
)
def test_every_class_is_covered_by_its_table(cls):
    """`bind` asserts that each parameter has its row; here also that no name is twice or ignored."""
    family = next(family for family in registry.FAMILIES.values() if cls in family.classes)
    preset = next(config for name, config in family.presets.items() if name.startswith("tiny"))
    model = cls(preset)
    names = [tensor.name for tensor in bind(family.weights, flatten(modelzoo.abstract_params(model)))]
    assert len(set(names)) == len(names)
    assert not [name for name in names if family.weights.ignores(name)]
    assert all(re.fullmatch(r"[\w.]+", name) for name in names)

"""train/comparing.py: the step of every kind of mesh against one device; how differences are scaled and located."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from train import comparing
from train.comparing import Case, Difference, Result
from train.random_batch import draw_batch

GPTJ = dict(vocab_size=67, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
BERT = dict(vocab_size=67, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@functools.cache
def problem(family):
    """Two microbatches; GPT-J has dropout, and so takes as many slices where there are no stages."""
    model = {
        "gptj": lambda: modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", **GPTJ)),
        "megatron_bert": lambda: modelzoo.MegatronBertForPreTraining(
            modelzoo.get_config("tiny-megatron-bert", **BERT)
        ),
        "mvp": lambda: modelzoo.MvpForConditionalGeneration(modelzoo.get_config("tiny-mvp", vocab_size=67)),
    }[family]()
    batch = draw_batch(model, rows=8, length=8)
    return comparing.make_problem(model, batch, microbatches=2, num_steps=2 if family == "gptj" else 1)


@functools.cache
def reference(family):
    return comparing.run_case(problem(family), Case())


def rules_of(**axes):
    return parallel.make_rules(parallel.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())]))


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("gptj", dict(stage=2, tensor=2)),
        ("megatron_bert", dict(fsdp=2, tensor=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_step_is_the_same_on_every_mesh(family, axes):
    case = Case(rules_of(**axes))
    found = comparing.run_case(problem(family), case)
    differences = comparing.compare(reference(family), found)
    beyond = [one for one in differences if not one.is_within]
    assert not beyond, beyond
    params = modelzoo.abstract_params(problem(family).model)
    assert len(differences) == problem(family).num_steps + 2 * len(jax.tree.leaves(params))
    started = comparing._by_name(problem(family).params)
    name = "trunk/layers/attention/query/kernel"
    moved = np.max(np.abs(found.params[name] - started[name]))
    assert moved > 100 * comparing.TENSOR_TOLERANCE * np.max(np.abs(started[name]))  # the step did something


def test_labels_say_mesh_and_schedule():
    assert Case().label == "one device"
    assert Case(rules_of(data=2, tensor=2)).label == "data=2,tensor=2"
    assert Case(rules_of(stage=2), "gpipe").label == "stage=2, gpipe"


def result(loss=2.0, **tensors):
    arrays = {name.replace("_", "/"): np.asarray(value, np.float32) for name, value in tensors.items()}
    return Result([loss], arrays, arrays)


def worst(mine, theirs):
    return {(one.kind, one.name): one.value for one in comparing.compare(mine, theirs)}


def test_a_difference_is_relative_to_the_largest_element_of_its_tensor():
    found = comparing.compare(result(mlp_kernel=[1.0, -4.0]), result(2.5, mlp_kernel=[1.0, -4.5]))
    assert found == [
        Difference("loss", "step 1", 0.25, comparing.LOSS_TOLERANCE),
        Difference("gradient", "mlp/kernel", 0.125, comparing.TENSOR_TOLERANCE),
        Difference("parameter", "mlp/kernel", 0.125, comparing.TENSOR_TOLERANCE),
    ]
    assert not any(one.is_within for one in found)


def test_the_worst_comes_first():
    mine, theirs = result(a_kernel=[1.0], b_kernel=[1.0]), result(a_kernel=[1.1], b_kernel=[1.3])
    kinds = [(one.kind, one.name) for one in comparing.compare(mine, theirs)]
    assert kinds[0] == ("loss", "step 1")
    assert [name for _, name in kinds[1:]] == ["b/kernel", "b/kernel", "a/kernel", "a/kernel"]


def test_what_is_zero_by_mathematics_is_measured_by_its_module():
    """Rounding alone on both meshes passes; a value that only one of them has does not."""
    mine = result(key_kernel=[0.5, 0.1], key_bias=[1e-9, -2e-9])
    noise = result(key_kernel=[0.5, 0.1], key_bias=[-3e-9, 1e-9])
    wrong = result(key_kernel=[0.5, 0.1], key_bias=[1e-3, 0.0])
    assert worst(mine, noise)["gradient", "key/bias"] == pytest.approx(8e-9, rel=0.01)
    assert worst(mine, wrong)["gradient", "key/bias"] == pytest.approx(2e-3, rel=0.01)
    # A bias that is merely small is measured by itself.
    small = result(key_kernel=[0.5], key_bias=[1e-5])
    assert worst(small, result(key_kernel=[0.5], key_bias=[2e-5]))["gradient", "key/bias"] == pytest.approx(
        1.0
    )


def test_zero_modules_and_nan():
    silent = result(pooler_kernel=[0.0], mlp_kernel=[2.0])
    assert worst(silent, silent)["gradient", "pooler/kernel"] == 0.0
    assert worst(silent, result(pooler_kernel=[1.0], mlp_kernel=[2.0]))["gradient", "pooler/kernel"] == 0.5
    broken = result(math.nan, pooler_kernel=[0.0], mlp_kernel=[math.nan])
    assert all(one.value == math.inf for one in comparing.compare(silent, broken) if "pooler" not in one.name)
    nothing = result(mlp_kernel=[0.0])
    assert worst(nothing, result(mlp_kernel=[1e-20]))["gradient", "mlp/kernel"] == math.inf


@pytest.mark.long
def test_the_key_bias_of_a_real_model_is_such_a_zero():
    gradients = reference("megatron_bert").gradients
    key = "trunk/layers/attention/key"
    share = np.max(np.abs(gradients[f"{key}/bias"])) / np.max(np.abs(gradients[f"{key}/kernel"]))
    assert 0 < share < comparing.TENSOR_TOLERANCE


def test_constant_parameters_are_shaken():
    params = problem("gptj").params
    for name in ("scale", "bias"):
        assert np.std(params["trunk"]["layers"]["norm"][name]) > 0.05
    assert np.std(params["trunk"]["layers"]["mlp"]["fc_in"]["kernel"]) < 0.05


def test_outputs_come_in_the_order_of_the_forward_pass():
    names = [name for name, _ in comparing.module_outputs(problem("mvp"), None)]
    wanted = [
        "trunk/embed",
        "trunk/encoder/layers[0]/attention/query",
        "trunk/encoder/layers[1]/mlp/fc_out",
        "trunk/encoder",
        "trunk/decoder/layers[0]/attention/query",
        "trunk/decoder",
        "trunk",
        "lm_head",
        "MvpForConditionalGeneration",
    ]
    assert next(name for name in names if name in wanted) == "trunk/embed"
    places = [len(names) - 1 - names[::-1].index(name) for name in wanted[1:]]
    assert places == sorted(places)


def test_the_first_output_that_differs_is_found():
    one, two = np.array([1.0, -np.inf]), np.array([2.0, 4.0, 0.0])
    outputs = [("a", one), ("b", two), ("c", one)]
    assert comparing.first_parting(outputs, outputs) is None
    # Padded logits are cut to what both have.
    assert comparing.first_parting(outputs, [("a", one), ("b", np.append(two, 9)), ("c", one)]) is None
    other = [("a", one), ("b", two * 1.5), ("c", one * 2)]
    assert comparing.first_parting(outputs, other) == ("b", 0.5)
    assert comparing.first_parting(outputs, [("a", one + np.nan), *other[1:]]) == ("a", math.inf)


def test_the_first_gradient_that_differs_going_back_is_found():
    names = ["embed", "layers[0]/mlp", "layers[1]/mlp", "head"]
    mine = result(embed_table=[1.0], layers_mlp_kernel=[[1.0], [1.0]], head_kernel=[1.0])
    theirs = result(embed_table=[2.0], layers_mlp_kernel=[[2.0], [1.0]], head_kernel=[1.0])
    assert comparing.first_parting_back(names, mine, mine) is None
    assert comparing.first_parting_back(names, mine, theirs) == "layers[0]/mlp"
    theirs.gradients["layers/mlp/kernel"][1] = 3.0
    assert comparing.first_parting_back(names, mine, theirs) == "layers[1]/mlp"


def test_gradients_are_those_that_the_optimizer_was_given():
    params = {"w": jnp.array([3.0])}
    optimizer = comparing._recording(comparing.adamw(learning_rate=0.1))
    _, state = optimizer.update({"w": jnp.array([5.0])}, optimizer.init(params), params)
    assert float(comparing._recorded({"inside": (state,)})["w"][0]) == 5.0

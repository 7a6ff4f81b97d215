"""One step: the same numbers however the batch is cut and wherever the arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import modelzoo
import parallel
import train
from tests.zoo import assert_close, assert_close_relative, tiny_gptj
from train import optim, schedules
from train.step import has_dropout

SIZES = dict(vocab_size=37, n_embd=32, n_head=4, n_inner=64, n_layer=2)
MODEL = modelzoo.GPTJForCausalLM(tiny_gptj(**SIZES))
DROPPING = modelzoo.GPTJForCausalLM(tiny_gptj(**SIZES, resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.3))
SGD = optax.sgd(1.0, momentum=0.0)  # its state holds the gradient


def mesh_of(**axes):
    return parallel.make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])


def batch_of(rows=8, length=12, seed=0):
    """Rows with very different numbers of labels: a mean of means would show."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 37, (rows, length)).astype(np.int32)
    labels = ids.copy()
    for row in range(rows):
        labels[row, : random.integers(0, length)] = -100
    labels[rows // 2] = -100
    return {"input_ids": ids, "labels": labels}


BATCH = batch_of()


def run(model=MODEL, optimizer=SGD, steps=1, batch=BATCH, mesh=None, **options):
    """(parameters after the steps, metrics and gradient of the last one), at their true sizes."""
    state = train.init_state(model, optimizer, mesh=mesh, rng=jax.random.key(7))
    step = train.make_train_step(model, optimizer, mesh=mesh, **options)
    for _ in range(steps):
        state, metrics = step(state, batch)
    trees = (parallel.unpad_params(tree, model) for tree in (state.params, state.opt_state[0].trace))
    after, gradient = jax.tree.map(np.asarray, tuple(trees))
    return after, jax.tree.map(float, metrics), gradient


@pytest.fixture(scope="module")
def whole():
    return run()


def test_the_loss_and_gradient_are_those_of_train_loss(whole):
    _, metrics, gradient = whole
    params = train.init_state(MODEL, SGD, rng=jax.random.key(7)).params

    def value(params):
        return train.loss(MODEL, MODEL.apply({"params": params}, input_ids=BATCH["input_ids"]), BATCH)

    (loss, found), expected = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    norm = np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(expected)))
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["tokens"] == int(found["tokens"]) == (BATCH["labels"][:, 1:] != -100).sum()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert_close_relative(gradient, expected, 1e-5)
    assert set(metrics) == {"loss", "tokens", "grad_norm"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (dict(stage=2, data=2, tensor=2), dict(microbatches=4)),
        (dict(stage=2, fsdp=2), dict(schedule="gpipe", microbatches=2, accumulate=2)),
    ],
    ids=str,
)
def test_a_pipeline_is_the_whole_batch(whole, axes, options):
    _, metrics, gradient = run(mesh=mesh_of(**axes), **options)
    assert metrics["loss"] == pytest.approx(whole[1]["loss"], rel=1e-6)
    assert metrics["tokens"] == whole[1]["tokens"]
    assert_close_relative(gradient, whole[2], 1e-5)


@pytest.mark.long
def test_dropout_is_the_same_with_and_without_stages():
    """The key is folded by layer and microbatch, as accumulation folds it by slice."""
    model = modelzoo.GPTJForCausalLM(tiny_gptj(**SIZES | dict(n_layer=4), resid_pdrop=0.2, attn_pdrop=0.3))
    _, expected, plain = run(model, accumulate=4)
    _, metrics, gradient = run(model, mesh=mesh_of(stage=2, data=2), microbatches=4, schedule="interleaved")
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert_close_relative(gradient, plain, 1e-5)


def test_microbatches_fill_the_stages_unless_they_are_given():
    feed = train.make_train_step(MODEL, SGD, mesh=mesh_of(stage=2, data=2))._feed
    assert feed.num_microbatches(32, None, 2) == 8
    assert feed.num_microbatches(12, None, 2) == 6
    assert feed.num_microbatches(6, None, 2) == 3
    with pytest.raises(ValueError, match="microbatches=5 do not divide a batch of 32 rows .* that does is 4"):
        feed.num_microbatches(32, 5, 2)
    with pytest.warns(UserWarning, match="fewer than stage=2: the stages wait 50% of the time"):
        assert feed.num_microbatches(2, None, 2) == 1


def test_accumulated_slices_are_the_whole_batch(whole):
    after, metrics, gradient = run(accumulate=4)
    assert metrics["loss"] == pytest.approx(whole[1]["loss"], rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(whole[1]["grad_norm"], rel=1e-6)
    assert metrics["tokens"] == whole[1]["tokens"]
    assert_close_relative(gradient, whole[2], 1e-5)
    assert_close_relative(after, whole[0], 1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    ("axes", "accumulate"),
    [
        ({"data": 8}, 1),
        ({"fsdp": 8}, 1),
        ({"tensor": 4}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
    ],
)
def test_any_mesh_takes_the_same_step(whole, axes, accumulate):
    after, metrics, gradient = run(mesh=mesh_of(**axes), accumulate=accumulate)
    assert metrics["loss"] == pytest.approx(whole[1]["loss"], rel=1e-6)
    assert metrics["tokens"] == whole[1]["tokens"]
    assert_close_relative(gradient, whole[2], 1e-5)
    assert_close_relative(after, whole[0], 1e-5)


@pytest.mark.long
def test_dropout_follows_key_and_step_whatever_the_mesh():
    one, two = (run(DROPPING, steps=steps)[1]["loss"] for steps in (1, 2))
    quiet = run(MODEL, steps=1)[1]["loss"]
    assert one != quiet
    meshed = run(DROPPING, steps=2, mesh=mesh_of(data=2, fsdp=2, tensor=2))[1]["loss"]
    assert meshed == pytest.approx(two, rel=1e-5)
    frozen = optax.sgd(0.0, momentum=0.0)  # nothing changes but the step's number
    assert run(DROPPING, frozen, steps=1)[1]["loss"] != run(DROPPING, frozen, steps=2)[1]["loss"]


@pytest.mark.long
def test_slices_draw_their_own_dropout():
    # All rows alike: if the slices shared their masks, their losses would be alike too.
    rows = {name: np.repeat(value[:1], 2, 0) for name, value in batch_of(1).items()}
    rows["labels"] = rows["input_ids"]
    halves = run(DROPPING, batch=rows, accumulate=2)[1]["loss"]
    first = run(DROPPING, batch={name: value[:1] for name, value in rows.items()})[1]["loss"]
    assert abs(halves - first) > 1e-4


def test_has_dropout():
    assert has_dropout(DROPPING)
    assert not has_dropout(MODEL)


def test_training_in_bfloat16_over_float32_parameters():
    model = modelzoo.GPTJForCausalLM(tiny_gptj(**SIZES), dtype=jnp.bfloat16, remat="full")
    optimizer = optim.adamw(learning_rate=1e-2)
    state = train.init_state(model, optimizer)
    step = train.make_train_step(model, optimizer, learning_rate=1e-2)
    found = []
    for _ in range(8):
        state, metrics = step(state, BATCH)
        found.append(float(metrics["loss"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert found[-1] < 0.8 * found[0]
    assert float(metrics["learning_rate"]) == np.float32(1e-2)


def test_bfloat16_parameters_keep_their_dtype():
    model = modelzoo.GPTJForCausalLM(tiny_gptj(**SIZES), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    optimizer = optim.adamw(learning_rate=schedules.constant(value=1e-2))
    state = train.init_state(model, optimizer)
    state, metrics = train.make_train_step(model, optimizer, accumulate=2)(state, BATCH)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(metrics["loss"])


def test_compiled_once_and_donated():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    optimizer = optim.adamw()
    state = train.init_state(MODEL, optimizer, mesh=mesh)
    step = train.make_train_step(MODEL, optimizer, mesh=mesh)
    compiled = []

    def listen(event, seconds, **_):
        compiled.append(event == "/jax/core/compile/backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first, _ = step(state, BATCH)
        assert any(compiled)
        compiled.clear()
        second, metrics = step(first, batch_of(seed=3))
        assert not any(compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert second.step == 2
    assert metrics["loss"].sharding.is_fully_replicated
    shardings = jax.tree.map(lambda leaf: leaf.sharding, second)
    target = train.abstract_state(MODEL, optimizer, mesh=mesh)
    assert jax.tree.all(jax.tree.map(lambda have, want: have == want.sharding, shardings, target))


def test_lowers_without_any_array():
    mesh = mesh_of(fsdp=4, tensor=2)
    optimizer = optim.adamw(learning_rate=schedules.warmup_cosine(peak=1e-3, num_steps=10))
    step = train.make_train_step(MODEL, optimizer, mesh=mesh, accumulate=2)
    ids = jax.ShapeDtypeStruct((8, 12), jnp.int32)
    lowered = step.lower(train.abstract_state(MODEL, optimizer, mesh=mesh), {"input_ids": ids, "labels": ids})
    assert lowered.compile().memory_analysis().argument_size_in_bytes > 0
    text = lowered.as_text(debug_info=True)
    for phase in ("forward", "loss", "optimizer", "metrics"):
        assert phase in text


@pytest.mark.long
def test_a_loss_of_two_parts():
    model = modelzoo.GPTJForQuestionAnswering(tiny_gptj(**SIZES))
    random = np.random.default_rng(0)
    spans = {name: random.integers(0, 20, 8) for name in ("start_positions", "end_positions")}
    batch = {"input_ids": BATCH["input_ids"], "attention_mask": np.ones((8, 12), np.int32), **spans}
    _, metrics, gradient = run(model, batch=batch)
    assert metrics["loss"] == pytest.approx((metrics["start_loss"] + metrics["end_loss"]) / 2, rel=1e-6)
    # 20 positions for 12 tokens: the two parts ignore different rows
    _, sliced, summed = run(model, batch=batch, mesh=mesh_of(data=2, tensor=2), accumulate=2)
    assert {name: pytest.approx(value, rel=1e-5) for name, value in metrics.items()} == sliced
    # Absolute: what is added to every position alike (biases at the end) has a gradient of zero.
    assert_close(summed, gradient, 1e-5 * metrics["grad_norm"])


def test_the_attention_mask_reaches_the_model(whole):
    mask = np.ones((8, 12), np.int32)
    mask[:, :6] = 0
    assert run(batch={**BATCH, "attention_mask": mask})[1]["loss"] != whole[1]["loss"]


@pytest.mark.parametrize("axes", [None, {"data": 2, "tensor": 2}])
def test_evaluation_sums_over_batches(whole, axes):
    mesh = None if axes is None else mesh_of(**axes)
    params = train.init_state(DROPPING, SGD, mesh=mesh, rng=jax.random.key(7)).params
    evaluate = train.make_eval_step(DROPPING, mesh=mesh)
    halves = [{name: value[rows] for name, value in BATCH.items()} for rows in (slice(0, 4), slice(4, 8))]
    sums = [evaluate(params, half) for half in halves]
    assert sum(int(s["tokens"]) for s in sums) == whole[1]["tokens"]
    mean = sum(float(s["loss_sum"]) for s in sums) / whole[1]["tokens"]
    assert mean == pytest.approx(whole[1]["loss"], rel=1e-6)  # without dropout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "2f2b"}, "schedule '2f2b' is unknown: choose from 1f1b, gpipe, interleaved"),
        ({"accumulate": 0}, "accumulate=0: it is at least 1"),
        ({"microbatches": 0}, "microbatches=0"),
        (
            {"mesh": {"stage": 4}},
            "'layers' has size 2, which mesh stage=4 does not divide: the nearest that works is stage=2",
        ),
        ({"virtual_stages": 0}, "virtual_stages=0"),
        ({"mesh": {"tensor": 8}}, "heads"),
    ],
)
def test_steps_that_cannot_be_made(options, message):
    if "mesh" in options:
        options = {"mesh": mesh_of(**options["mesh"])}
    with pytest.raises(ValueError, match=message):
        train.make_train_step(MODEL, SGD, **options)


def without(name):
    return {key: value for key, value in BATCH.items() if key != name}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            batch_of(6),
            "a batch of 6 rows does not divide into accumulate=2 slices over 2 shards .* multiple of 4",
        ),
        (without("labels"), "the batch has no 'labels', which GPTJForCausalLM learns from"),
        ({**BATCH, "attention_masks": BATCH["labels"]}, "'attention_masks' is neither an input nor a label"),
        ({**BATCH, "labels": BATCH["labels"][:4]}, "differ in their first dimension"),
        ({**BATCH, "labels": np.full((8, 12), 37)}, "labels holds 37 in row 0"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    mesh = mesh_of(data=2)
    step = train.make_train_step(MODEL, SGD, mesh=mesh, accumulate=2)
    with pytest.raises(ValueError, match=message):
        step(train.abstract_state(MODEL, SGD, mesh=mesh), batch)


@pytest.mark.long
def test_only_the_prompts_of_a_lightweight_model_train():
    """The rest keeps its bits and has no moments in the optimizer's state."""
    config = modelzoo.get_config("tiny-mvp", vocab_size=37, use_prompt=True)
    model = modelzoo.MvpForConditionalGeneration(config).set_lightweight_tuning()
    state = train.init_state(model, optim.adamw(learning_rate=0.1), rng=jax.random.key(7))
    before = jax.tree.map(np.asarray, state.params)
    after, _ = train.make_train_step(model, optim.adamw(learning_rate=0.1))(state, BATCH)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), after.params, before)
    trains = modelzoo.trainable(model)
    assert any(jax.tree.leaves(moved))
    assert all(jax.tree.leaves(jax.tree.map(lambda m, t: t or not m, moved, trains)))
    prompts = sum(jax.tree.leaves(jax.tree.map(lambda a, t: a.size if t else 0, before, trains)))
    kept = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim)
    assert kept == 2 * prompts

"""Checkpoints as command lines name them: which folder is meant, what is refused before arrays are read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from inference.dry_run import plan_load
from inference.loading import open_checkpoint, rules_of_mesh
from parallel.checkpoint import save_tree
from tests import zoo
from tests.test_cluster import results


@pytest.fixture(scope="module")
def model():
    return modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=61, n_layer=1))


@pytest.fixture(scope="module")
def params(model):
    return parallel.init_params(model, jax.random.key(0))


def write_step(run, step, model, params):
    folder = run / "checkpoints" / str(step)
    save_tree(folder / "params", params, jax.tree.map(lambda leaf: leaf.shape, params))
    content = model.config.to_hf() | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "commit_success.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def run(model, params, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_step(run, 2, model, jax.tree.map(jnp.zeros_like, params))
    write_step(run, 10, model, params)
    return run


@pytest.fixture(scope="module")
def hf(model, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    modelzoo.to_hf(model, params, folder)
    return folder


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def test_a_run_means_its_newest_step(run, model, params):
    checkpoint = open_checkpoint(run, jnp.float32)
    assert checkpoint.is_run
    assert checkpoint.folder.name == "10"
    assert checkpoint.model == model
    assert_same(checkpoint.read_params(), params)


def test_a_step_means_itself(run, params):
    checkpoint = open_checkpoint(run / "checkpoints" / "2", jnp.float32)
    assert_same(checkpoint.read_params(), jax.tree.map(jnp.zeros_like, params))


def test_a_hugging_face_folder_in_the_dtype_asked_for(hf, params):
    checkpoint = open_checkpoint(hf, jnp.bfloat16)
    assert not checkpoint.is_run
    assert_same(checkpoint.read_params(), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_parameters_go_straight_onto_a_mesh(request, kind, params):
    rules = parallel.make_rules(parallel.make_mesh(tensor=2, fsdp=4))
    checkpoint = open_checkpoint(request.getfixturevalue(kind), jnp.float32)
    placed = checkpoint.read_params(rules)
    assert placed["trunk"]["embed"]["embedding"].shape[0] == 62  # the vocabulary, padded
    assert len(placed["lm_head"]["kernel"].sharding.device_set) == 8
    assert_same(parallel.unpad_params(placed, checkpoint.model), params)


def test_ends_come_from_generation_config_then_config(hf, tmp_path):
    content = json.loads((hf / "config.json").read_text())

    def ends(eos, generation=None):
        (tmp_path / "config.json").write_text(json.dumps(content | {"eos_token_id": eos}))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return open_checkpoint(tmp_path, jnp.float32).eos_token_id

    assert ends(5) == (5,)
    assert ends(None) is None
    assert ends(50256) is None  # past the vocabulary
    assert ends(5, {"eos_token_id": [7, 8]}) == (7, 8)
    assert ends(5, {}) == (5,)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "unknown model class 'LlamaForCausalLM'"),
        (
            {"architectures": ["GPTJForSequenceClassification"]},
            "does not continue prompts: a checkpoint of .* does; it is for .*classify",
        ),
        ({"architectures": None}, "names no architecture"),
        ({"model_type": "llama"}, "unknown model_type 'llama'"),
        ({"n_head": 5}, "n_"),
    ],
)
def test_configs_that_cannot_generate_are_refused(hf, tmp_path, changes, error):
    content = json.loads((hf / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"config\.json: .*{error}"):
        open_checkpoint(tmp_path, jnp.float32)


def test_missing_and_damaged_checkpoints_are_named(tmp_path):
    with pytest.raises(OSError, match=r"no checkpoint at '.*nowhere': there is no such folder"):
        open_checkpoint(tmp_path / "nowhere", jnp.float32)
    with pytest.raises(OSError, match=r"somebody/nothing: no such folder here, and the Hugging Face hub"):
        open_checkpoint("somebody/nothing", jnp.float32)
    for step in (80, 120):
        (tmp_path / f"run/checkpoints/{step}").mkdir(parents=True)
    with pytest.raises(
        OSError, match=r"no checkpoint at .*100': there is no such folder; there are 80, 120$"
    ):
        open_checkpoint(tmp_path / "run/checkpoints/100", jnp.float32)
    with pytest.raises(OSError, match="no checkpoint"):
        open_checkpoint(tmp_path, jnp.float32)
    for text, error in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=error):
            open_checkpoint(tmp_path, jnp.float32)


def test_arrays_of_another_architecture_are_refused(run, tmp_path, model, params):
    folder = write_step(tmp_path, 1, model, params)
    content = json.loads((folder / "config.json").read_text()) | {"n_inner": 32}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="mlp/fc_in"):
        open_checkpoint(tmp_path, jnp.float32).read_params()


def test_two_processes_read_what_their_devices_hold(tmp_path):
    model = modelzoo.GPTJForCausalLM(zoo.tiny_gptj(n_embd=32, n_head=4, n_inner=36, vocab_size=38))
    modelzoo.to_hf(model, zoo.random_params(model), tmp_path)
    command = ["-m", "tests.cluster_loading", str(tmp_path), "fsdp=2,tensor=2"]
    found = results(dict.fromkeys(range(2), command), devices=2)
    assert {code for code, _, _ in found.values()} == {0}, found
    reports = [json.loads(lines[-1]) for _, lines, _ in found.values()]
    sizes = dict(fsdp=2, tensor=2)
    plan = plan_load(tmp_path, sizes, quantize="int8", hosts=2)
    assert [(report["read"], report["held"]) for report in reports] == [
        (host.reads, host.holds) for host in plan.hosts
    ]
    assert sum(report["read"] for report in reports) < 1.1 * plan_load(tmp_path).hosts[0].reads
    # Scales are of whole channels, though each process saw a part of them: the same values as in one process.
    rules = parallel.make_rules(parallel.make_mesh(**sizes, devices=jax.devices()[:4]))
    alone = open_checkpoint(tmp_path, "float32").read_prepared(rules, "int8")
    for report, devices in zip(reports, (jax.devices()[:2], jax.devices()[2:4]), strict=True):
        sums = [
            float(np.sum(np.abs(np.asarray(shard.data, np.float64))))
            for leaf in jax.tree.leaves(alone)
            for shard in leaf.addressable_shards
            if shard.device in devices
        ]
        assert report["sums"] == sums


def test_a_mesh_takes_the_first_devices_that_it_needs():
    rules = rules_of_mesh("tensor=2")
    assert rules is not None
    assert rules.mesh.shape["tensor"] == 2
    assert rules.mesh.devices.ravel().tolist() == jax.devices()[:2]
    whole = rules_of_mesh("fsdp=2,tensor=-1")
    assert whole is not None
    assert whole.mesh.size == len(jax.devices())
    assert rules_of_mesh("") is None
    for text, message in (
        ("tensor=16", "needs 16 devices"),
        ("tensor=0", "at least 1"),
        ("tensr=2", "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            rules_of_mesh(text)

"""The plan of a load is what the load then does, byte for byte."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from inference.dry_run import plan_load
from inference.loading import open_checkpoint
from modelzoo import hf, tensor_files
from tests import zoo

MODEL = modelzoo.GPTJForCausalLM(zoo.tiny_gptj(n_embd=32, n_head=4, n_inner=36))
TIED = modelzoo.BloomForCausalLM(modelzoo.get_config("tiny-bloom", vocab_size=38))


@pytest.fixture(scope="module", params=[MODEL, TIED], ids=["gptj", "bloom"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    modelzoo.to_hf(request.param, zoo.random_params(request.param), folder, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2, tensor=4)], ids=["one", "mesh"])
def test_the_load_keeps_to_its_plan(folder, sizes, quantize, monkeypatch):
    read = []
    monkeypatch.setattr(
        tensor_files, "GAP_BYTES", 0
    )  # tensors this small would be read with what lies between
    monkeypatch.setattr(
        hf.placing.Reader, "read", _counting(hf.placing.Reader.read, read), raising=True
    )  # what is asked of the files
    plan = plan_load(folder, sizes, jnp.bfloat16, quantize)
    assert not read  # headers alone
    rules = parallel.make_rules(parallel.make_mesh(**sizes)) if sizes else None
    params = open_checkpoint(folder, jnp.bfloat16).read_prepared(rules, quantize)
    held = dict.fromkeys(jax.devices()[: len(plan.device_bytes)], 0)
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert plan.device_bytes == tuple(held.values())
    (host,) = plan.hosts
    assert host.holds == sum(held.values())
    assert host.reads == sum(read)
    assert host.devices == len(held)
    largest = {"gptj": (40 if sizes else 37) * 32, "bloom": 64 * 256}[plan.model.config.model_type]
    assert host.passing == largest * (4 if quantize else 2)  # to int8 straight from the file's float32
    text = str(plan)
    assert f"reads {host.reads:,} bytes" in text
    assert "nothing has been read" in text


def _counting(read, counts):
    def counting(self, file, offset, count, dtype):
        counts.append(count * dtype.itemsize)
        return read(self, file, offset, count, dtype)

    return counting


def test_hosts_that_are_not_here_share_the_reading(folder):
    alone = plan_load(folder, {}, jnp.float32)
    plan = plan_load(folder, dict(fsdp=2, tensor=2), jnp.float32, hosts=2)
    assert [host.devices for host in plan.hosts] == [2, 2]
    assert len(set(plan.device_bytes)) == 1
    assert alone.hosts[0].reads < sum(host.reads for host in plan.hosts) < 1.2 * alone.hosts[0].reads
    assert plan.simulated
    assert "each of hosts 0 to 1: reads" in str(plan)
    with pytest.raises(ValueError, match="hosts = 3 does not divide the mesh's 4 devices"):
        plan_load(folder, dict(tensor=4), hosts=3)
    with pytest.raises(ValueError, match="hosts = 2 without a mesh"):
        plan_load(folder, {}, hosts=2)
    with pytest.raises(ValueError, match=r"parameter trunk/.*which mesh tensor=3 does not divide"):
        plan_load(folder, dict(tensor=3))


def test_bloom_176b_from_its_config(tmp_path):
    config = modelzoo.get_config("bloom-176b").to_hf() | {"architectures": ["BloomForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    plan = plan_load(tmp_path, dict(tensor=16), "bfloat16")  # more than are here: planned for accelerators
    assert plan.hosts[0].reads == 2 * modelzoo.num_params(plan.model) == 352_494_542_848
    kernels = 250880 * 14336 + 70 * 12 * 14336**2
    saved = plan.hosts[0].holds - plan_load(tmp_path, dict(tensor=16), "bfloat16", "int8").hosts[0].holds
    assert 0.999 * kernels < saved < kernels  # a byte of each, less the scales
    assert "no weights are here" in str(plan)


def test_a_training_run_is_planned_from_its_config(tmp_path):
    step = tmp_path / "checkpoints" / "3"
    (step / "params").mkdir(parents=True)
    (step / "commit_success.txt").write_text("")
    (step / "config.json").write_text(
        json.dumps(MODEL.config.to_hf() | {"architectures": ["GPTJForCausalLM"]})
    )
    plan = plan_load(tmp_path, {}, np.float32)
    assert plan.hosts[0].reads == plan.hosts[0].holds == 4 * modelzoo.num_params(MODEL)
    assert "a training run's checkpoint" in str(plan)

"""parallel/explain.py: what the page says is what the arrays do."""

import re
import subprocess
import sys

import pytest
from jax.sharding import PartitionSpec as P

import modelzoo
import parallel
from parallel import explain as entry
from parallel.terminal import model_of, rules_of
from tests.house import ROOT
from tests.zoo import TINY, leaves_by_name

PRESETS = tuple(TINY.values())


def explained(preset, mesh, *fields, **sizes):
    model, rules = model_of(preset, fields=fields), rules_of(mesh)
    if sizes:
        return entry.explain_activations(model, rules, **sizes)
    return {one.path: one for one in entry.explain_parameters(model, rules)}


@pytest.mark.parametrize("mesh", ["stage=2,fsdp=2,tensor=2", "data=2,tensor=4"])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_lie_as_explained(preset, mesh):
    """Against the shards that jax makes of the same parameters."""
    found = explained(preset, mesh, "vocab_size=211")
    model, rules = model_of(preset, fields=["vocab_size=211"]), rules_of(mesh)
    arrays = leaves_by_name(parallel.abstract_sharded_params(model, rules))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        one = found[name]
        assert one.shape == array.shape
        assert one.shard_shape == array.sharding.shard_shape(array.shape)
        assert one.spec == array.sharding.spec
        assert len(one.reasons) == len(one.names) == array.ndim


def test_every_dimension_has_its_reason():
    found = explained("tiny-gptj", "stage=2,fsdp=2,tensor=2", "vocab_size=211")
    table = found["trunk/embed/embedding"]
    assert table.reasons == ("vocab 212 (padded from 211) over stage=2 x tensor=2", "embed 64 over fsdp=2")
    assert (table.bytes_per_device, table.num_bytes) == (212 * 64 * 4 // 8, 212 * 64 * 4)
    query = found["trunk/layers/attention/query/kernel"]
    assert query.reasons[-1] == "head_dim 16 whole (its rule names no mesh axis)"
    whole = explained("tiny-gptj", "data=2")["lm_head/bias"]
    assert whole.reasons == ("vocab 256 whole (tensor=1)",)


def test_activations_are_those_of_the_forward_pass():
    found = explained("tiny-gptj", "data=2,fsdp=2,tensor=2", rows=8, length=16)
    by_kind = {(one.path, one.shape): one for one in found}
    assert list(by_kind)[:2] == [("trunk/embed", (8, 16, 64)), ("trunk", (8, 16, 64))]
    assert list(by_kind)[-1] == ("lm_head", (8, 16, 256))
    heads = by_kind["trunk/layers/attention", (8, 16, 4, 16)]
    assert heads.count == 2 * 4  # query, key, value and context of two layers
    assert heads.spec == P(("data", "fsdp"), "context", "tensor", None)
    assert heads.shard_shape == (2, 16, 2, 16)
    assert heads.reasons[0] == "act_batch 8 over data=2 x fsdp=2"
    assert heads.reasons[-1] == "16 whole (no logical name)"
    assert by_kind["trunk/layers/mlp", (8, 16, 256)].count == 2
    assert all(one.names[0] == "act_batch" for one in found)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_family_names_its_activations(preset):
    found = explained(preset, "tensor=2", rows=2, length=8)
    axes = {name for one in found for name in one.names}
    assert axes >= {"act_batch", "act_length", "act_embed", "act_heads", "act_mlp", "act_vocab"}
    stacks = {one.path.split("/layers")[0] for one in found if "/layers" in one.path}
    has_encoder = model_of(preset).task == "seq2seq_lm"
    assert stacks == ({"trunk/encoder", "trunk/decoder"} if has_encoder else {"trunk"})


def test_the_page_and_its_totals(capsys):
    entry.main(["tiny-gptj", "stage=2,fsdp=2,tensor=2"])
    out = capsys.readouterr().out
    assert out.startswith("GPTJForCausalLM on stage=2,fsdp=2,tensor=2: 8 devices\n")
    name, reasons = out[out.index("  trunk/layers/mlp/fc_in/kernel") :].splitlines()[:2]
    assert "float32 [2, 64, 256]  (layers, embed, mlp)  P('stage', 'fsdp', 'tensor')" in name
    assert name.endswith("  16 KiB per device of 128 KiB")
    assert reasons.strip() == "layers 2 over stage=2; embed 64 over fsdp=2; mlp 256 over tensor=2"
    totals = re.findall(r"  (parameters.*?) +([\d.]+ \w+) of ([\d.]+ \w+); 1/8 would be .*: \+(\d\.\d)%", out)
    assert [name for name, *_ in totals] == ["parameters", "parameters and AdamW"]
    assert all(float(excess) < 2 for *_, excess in totals)
    size = modelzoo.num_params(model_of("tiny-gptj")) * 4
    assert float(totals[0][2].split()[0]) == pytest.approx(size / 1024, rel=1e-3)


def test_copies_are_seen_in_the_totals(capsys):
    entry.main(["tiny-gptj", "data=2,fsdp=2", "--rows", "4", "--length", "8"])
    assert "1/4 would be" in (out := capsys.readouterr().out)
    assert out.count("+101.2%") == 2  # two copies, and a bias over the vocabulary that fsdp does not cut


def test_a_large_model_takes_no_memory():
    found = explained("bloom-176b", "fsdp=2,tensor=4")
    assert sum(one.num_bytes for one in found.values()) > 4 * 176e9
    assert sum(one.bytes_per_device for one in found.values()) < 4 * 176.5e9 / 8


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (
            ["tiny-gptj", "tensor=8"],
            "'heads' has size 4, which mesh tensor=8 does not divide: .* is tensor=4",
        ),
        (["tiny-gptj", "stage=4"], "'layers' has size 2, which mesh stage=4 does not divide"),
        (["tiny-gptj", "width=2"], "unknown mesh axis 'width'"),
        (["tiny-gptj", "data=-1,tensor=3"], "3 does not divide the 8 devices"),
        (["tiny-gptj", "data=0"], "mesh axis data=0"),
        (["tiny-gptj", ""], "the mesh is empty"),
        (["gpt", "data=2"], "unknown preset 'gpt'"),
        (
            ["tiny-gptj", "data=2", "--rows", "3"],
            "'act_batch' has size 3, which mesh data=2 .* does not divide",
        ),
        (["tiny-gptj", "data=2", "--length", "65"], "65 tokens are more than the model's"),
        (["tiny-gptj", "data=2", "--rows", "0"], "--rows 0: it is at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, flags, error):
    with pytest.raises(SystemExit) as stop:
        entry.main(flags)
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{error}[^\n]*\n", captured.err)


def test_help_teaches():
    program = [sys.executable, "-m", "parallel.explain", "--help"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    for word in ("examples:", "MODEL", "MESH", "--rows", "(default: 8)"):
        assert word in done.stdout

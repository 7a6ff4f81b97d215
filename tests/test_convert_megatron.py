"""Megatron-LM checkpoints of every version and on every number of ranks become transformers' tensors."""

import numpy as np
import pytest

import modelzoo
from tests import megatron_state as megatron
from tests.converted import convert, read_config, read_folder
from tests.torch_files import save_tree
from tests.zoo import FIXTURES, assert_equal


@pytest.fixture(scope="module")
def bert():
    return megatron.bert_arrays()


@pytest.fixture(scope="module")
def gpt2():
    return megatron.gpt2_arrays()


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "stream"])
@pytest.mark.parametrize("version", [None, 0, 1.0, 2.0, 3.0])
def test_bert_of_every_version(tmp_path, bert, version, legacy):
    model = megatron.bert_rank(bert, version or 0)
    file = megatron.save_rank(tmp_path / "model_optim_rng.pt", model, version, megatron.options(), legacy)
    written = convert("megatron-bert", file, tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), bert)
    assert written.config["architectures"] == ["MegatronBertForPreTraining"]


def test_from_hf_opens_the_result(tmp_path, bert):
    file = megatron.save_rank(tmp_path / "a.pt", megatron.bert_rank(bert, 2), 2.0, megatron.options())
    convert("megatron-bert", file, tmp_path / "out")
    model, params = modelzoo.from_hf(tmp_path / "out")
    assert type(model) is modelzoo.MegatronBertForPreTraining
    assert model.config.num_attention_heads == megatron.HEADS
    modelzoo.to_hf(model, params, tmp_path / "again")
    assert_equal(read_folder(tmp_path / "again"), bert)


def test_defaults_and_a_given_config(tmp_path, bert):
    """Without options the released 345M is meant, and the vocabulary is the file's."""
    file = megatron.save_rank(tmp_path / "a.pt", megatron.bert_rank(bert, 1), 1.0, None)
    with pytest.raises(ValueError, match=r"a\.pt: .*16 heads of the config.*pass --config"):
        convert("megatron-bert", file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sizes = {k: v for k, v in megatron.BERT_SIZES.items() if k != "vocab_size"}
    convert("megatron-bert", file, tmp_path / "out", sizes | {"layer_norm_eps": 1e-5})
    assert_equal(read_folder(tmp_path / "out"), bert)
    config = read_config(tmp_path / "out")
    assert config["vocab_size"] == megatron.PADDED
    assert config["layer_norm_eps"] == 1e-5


@pytest.mark.parametrize(
    ("dropped", "name"),
    [
        (("binary_head",), "MegatronBertForMaskedLM"),
        (("lm_head",), "MegatronBertForNextSentencePrediction"),
        (("lm_head", "binary_head"), "MegatronBertModel"),
    ],
)
def test_the_heads_decide_the_class(tmp_path, bert, dropped, name):
    model = {key: value for key, value in megatron.bert_rank(bert, 2).items() if key not in dropped}
    if name.endswith("MaskedLM"):  # a run without the binary head has no pooler
        del model["language_model"]["pooler"]
    file = megatron.save_rank(tmp_path / "a.pt", model, 2.0, megatron.options())
    assert convert("megatron-bert", file, tmp_path / "out").config["architectures"] == [name]
    loaded, _ = modelzoo.from_hf(tmp_path / "out")
    assert type(loaded).__name__ == name
    for key, array in read_folder(tmp_path / "out").items():
        np.testing.assert_array_equal(array, bert[key if key in bert else f"bert.{key}"])


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
@pytest.mark.parametrize("tp", [2, 4])
def test_bert_ranks(tmp_path, bert, version, tp):
    for rank in range(tp):
        model = megatron.bert_rank(bert, version, rank, tp)
        file = tmp_path / "run" / "iter_0000007" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        megatron.save_rank(file, model, version, megatron.options(tensor_model_parallel_size=tp))
    convert("megatron-lm", tmp_path / "run", tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), bert)


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
@pytest.mark.parametrize(("tp", "stages"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_gpt2_ranks_and_stages(tmp_path, gpt2, version, tp, stages):
    args = megatron.options(orig_vocab_size=megatron.V, bias_gelu_fusion=False, openai_gelu=True)
    for rank in range(tp):
        for stage in range(stages):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
            model = megatron.gpt2_rank(gpt2, version, rank, tp, stage, stages)
            megatron.save_rank(tmp_path / "run" / name / "model_optim_rng.pt", model, version, args)
    written = convert("megatron-lm", tmp_path / "run", tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), gpt2)
    assert megatron.GPT2_SIZES.items() <= written.config.items()
    assert written.config["activation_function"] == "gelu_new"


def test_virtual_stages_take_turns(tmp_path, gpt2):
    """With interleaving, stage 0 holds chunks 0 and 2, ...: here two chunks on one stage."""
    chunks = [megatron.gpt2_rank(gpt2, 2, stage=chunk, stages=2) for chunk in range(2)]
    args = megatron.options(orig_vocab_size=megatron.V)
    content = {"model0": chunks[0], "model1": chunks[1], "args": args, "checkpoint_version": 3.0}
    save_tree(tmp_path / "a.pt", content)
    convert("megatron-lm", tmp_path / "a.pt", tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), gpt2)


def test_newer_spellings(tmp_path, gpt2):
    """Transformer Engine's fused layers, and Megatron-Core's names."""
    spellings = {
        "engine": {
            "self_attention.query_key_value.": "self_attention.layernorm_qkv.",
            "input_layernorm.": "self_attention.layernorm_qkv.layer_norm_",
            "post_attention_layernorm.": "layernorm_mlp.layer_norm_",
            "self_attention.dense.": "self_attention.proj.",
            "mlp.dense_h_to_4h.": "layernorm_mlp.fc1_",
            "mlp.dense_4h_to_h.": "layernorm_mlp.fc2_",
        },
        "core": {
            "self_attention.query_key_value.": "self_attention.linear_qkv.",
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
            "self_attention.dense.": "self_attention.linear_proj.",
            "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
            "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
        },
    }
    for kind, renames in spellings.items():
        model = megatron.gpt2_rank(gpt2, 2)
        layers = model["language_model"].pop("encoder")
        for old, new in renames.items():
            layers = {name.replace(old, new): array for name, array in layers.items()}
        if kind == "core":
            embedding = model.pop("language_model")["embedding"]
            model = {f"decoder.{name}": array for name, array in layers.items()}
            model |= {f"embedding.{name}.weight": module["weight"] for name, module in embedding.items()}
            model["decoder.layers.0.self_attention._extra_state"] = None
        else:
            model["language_model"]["encoder"] = layers
        file = megatron.save_rank(tmp_path / kind, model, 3.0, megatron.options(orig_vocab_size=megatron.V))
        convert("megatron-lm", file, tmp_path / f"{kind}-out")
        assert_equal(read_folder(tmp_path / f"{kind}-out"), gpt2)


def test_a_padded_bert_is_cut(tmp_path, bert):
    """Rows of the embedding and entries of the head's bias, over ranks of which the last holds the padding."""
    for rank in range(4):
        file = tmp_path / "run" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        megatron.save_rank(file, megatron.bert_rank(bert, 2, rank, 4), 2.0, megatron.options())
    written = convert("megatron-lm", tmp_path / "run", tmp_path / "out", {"vocab_size": megatron.V})
    have = read_folder(tmp_path / "out")
    assert (written.config["vocab_size"], written.notes) == (megatron.V, ())
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        np.testing.assert_array_equal(have[name], bert[name][: megatron.V])


def test_a_missing_stage_is_named(tmp_path, gpt2):
    file = tmp_path / "run" / "mp_rank_00_000" / "model_optim_rng.pt"
    args = megatron.options(pipeline_model_parallel_size=2)
    megatron.save_rank(file, megatron.gpt2_rank(gpt2, 2, stage=0, stages=2), 2.0, args)
    with pytest.raises(
        ValueError, match="missing, such as .*; the run had 2 pipeline stages, of which 1 are here"
    ):
        convert("megatron-lm", tmp_path / "run", tmp_path / "out")


def test_an_untied_head_is_kept(tmp_path, gpt2):
    model = megatron.gpt2_rank(gpt2, 2)
    head = np.ones((megatron.PADDED, megatron.D), np.float32)
    model["language_model"]["output_layer"] = {"weight": head}
    file = megatron.save_rank(tmp_path / "a.pt", model, 2.0, megatron.options(orig_vocab_size=megatron.V))
    written = convert("megatron-lm", file, tmp_path / "out")
    assert written.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(read_folder(tmp_path / "out")["lm_head.weight"], head[: megatron.V])


@pytest.mark.parametrize("name", ["megatron-bert-0", "megatron-bert-1", "megatron-bert-2", "megatron-lm"])
def test_makes_what_the_scripts_of_transformers_make(tmp_path, name):
    """Files that torch wrote, and what those scripts made of them: tests/parity/make_convert_fixtures.py."""
    kind = "megatron-lm" if name == "megatron-lm" else "megatron-bert"
    convert(kind, FIXTURES / "convert" / name, tmp_path / "out")
    have = read_folder(tmp_path / "out")
    with np.load(FIXTURES / "convert" / f"{name}.npz") as want:
        assert have.keys() == set(want.files)
        for key, array in have.items():
            assert array.dtype == np.float16
            np.testing.assert_array_equal(array, want[key], err_msg=key)


def test_names_what_is_wrong(tmp_path, bert, gpt2):
    def refuses(what, kind, model, version=2.0, args=None, **changes):
        file = megatron.save_rank(tmp_path / "a.pt", model, version, args or megatron.options(**changes))
        with pytest.raises(ValueError, match=what) as error:
            convert(kind, file, tmp_path / "out")
        assert str(error.value).splitlines()[0].startswith(str(tmp_path / "a.pt"))
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]

    whole = megatron.gpt2_rank(gpt2, 2)
    refuses("holds a GPT, not a BERT.*megatron-lm", "megatron-bert", whole)
    refuses("checkpoint_version 1.5 is unknown", "megatron-lm", whole, 1.5)
    refuses("swiglu = True, which GPT-2 cannot", "megatron-lm", whole, swiglu=True)
    refuses("5 heads do not divide", "megatron-lm", whole, num_attention_heads=5)
    refuses("hidden_size.*'12'|n_embd is '12', not a size", "megatron-lm", whole, hidden_size="12")
    refuses("1 unexpected, such as Megatron's embedding.more.weight", "megatron-lm", _more(whole))
    flat = megatron.gpt2_rank(gpt2, 2)
    flat["language_model"]["encoder"]["layers.1.mlp.dense_h_to_4h.bias"] = np.ones((), np.float32)
    refuses(r"layers.1.mlp.dense_h_to_4h.bias has shape \[\], where 1 dim", "megatron-lm", flat)
    del whole["language_model"]["encoder"]["final_layernorm.bias"]
    refuses("1 missing, such as transformer.ln_f.bias", "megatron-lm", whole)
    refuses("encoder and a decoder", "megatron-lm", {"encoder.a": bert_like(), "decoder.b": bert_like()})
    part = megatron.bert_rank(bert, 2, 1, 4)
    wanted = "1 tensor-parallel ranks, where the run had 4.*all others"
    refuses(wanted, "megatron-bert", part, tensor_model_parallel_size=4)
    refuses("where the run had more ranks", "megatron-bert", part)


def _more(model):
    embedding = model["language_model"]["embedding"] | {"more": {"weight": np.ones(2, np.float32)}}
    return {"language_model": model["language_model"] | {"embedding": embedding}}


def bert_like():
    return np.ones((2, 2), np.float32)

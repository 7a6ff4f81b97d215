"""fairseq's RoBERTa: its names of all versions become transformers'."""

import argparse

import numpy as np
import pytest

import modelzoo
from tests.converted import convert, read_folder
from tests.torch_files import Call, Global, save_tree
from tests.zoo import drawn

D, F, V, P, L = 12, 20, 25, 18, 2
ROOTS = ["decoder.sentence_encoder", "encoder.sentence_encoder"]


def model(root, fused=False):
    """A model's tensors under fairseq's names."""
    shapes = {f"{root}.embed_tokens.weight": (V, D), f"{root}.embed_positions.weight": (P, D)}
    norms = [f"{root}.emb_layer_norm"]
    for i in range(L):
        layer = f"{root}.layers.{i}"
        norms += [f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"]
        dense = {f"self_attn.{part}_proj": (D, D) for part in ("q", "k", "v", "out")} | {
            "fc1": (F, D),
            "fc2": (D, F),
        }
        for name, shape in dense.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    head = root.split(".")[0] + ".lm_head"
    shapes |= {f"{head}.dense.weight": (D, D), f"{head}.dense.bias": (D,), f"{head}.bias": (V,)}
    shapes |= {
        f"{norm}.{kind}": (D,) for norm in [*norms, f"{head}.layer_norm"] for kind in ("weight", "bias")
    }
    tensors = {name: drawn(name.removeprefix(root), shape) for name, shape in shapes.items()}
    tensors[f"{head}.weight"] = tensors[f"{root}.embed_tokens.weight"]
    tensors[f"{root}.version"] = np.ones(1, np.float32)
    for i in range(L if fused else 0):
        for kind in ("weight", "bias"):
            names = [f"{root}.layers.{i}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            parts = [tensors.pop(name) for name in names]
            tensors[f"{root}.layers.{i}.self_attn.in_proj_{kind}"] = np.concatenate(parts)
    return tensors


def save(file, tensors, **options):
    args = argparse.Namespace(encoder_attention_heads=3, activation_fn="gelu", dropout=0.2, **options)
    extra = Call(Global("collections", "OrderedDict"))
    save_tree(
        file, {"args": args, "model": tensors, "extra_state": extra, "optimizer_history": []}, legacy=True
    )
    return file


@pytest.mark.parametrize("fused", [False, True], ids=["projections", "in_proj"])
@pytest.mark.parametrize("root", ROOTS)
def test_every_spelling(tmp_path, root, fused):
    written = convert("fairseq", save(tmp_path / "model.pt", model(root, fused)), tmp_path / "out")
    have, source = read_folder(tmp_path / "out"), model(root)
    assert len(have) == len(source) - 2 + 1  # the tied copy and the version go; token types come
    layer, theirs = "roberta.encoder.layer.1.", f"{root}.layers.1."
    for name, origin in {
        "roberta.embeddings.word_embeddings.weight": f"{root}.embed_tokens.weight",
        "roberta.embeddings.LayerNorm.bias": f"{root}.emb_layer_norm.bias",
        layer + "attention.self.query.weight": theirs + "self_attn.q_proj.weight",
        layer + "attention.self.key.bias": theirs + "self_attn.k_proj.bias",
        layer + "attention.self.value.weight": theirs + "self_attn.v_proj.weight",
        layer + "attention.output.LayerNorm.weight": theirs + "self_attn_layer_norm.weight",
        layer + "intermediate.dense.weight": theirs + "fc1.weight",
        layer + "output.dense.weight": theirs + "fc2.weight",
        layer + "output.LayerNorm.bias": theirs + "final_layer_norm.bias",
        "lm_head.layer_norm.weight": root.split(".")[0] + ".lm_head.layer_norm.weight",
        "lm_head.bias": root.split(".")[0] + ".lm_head.bias",
    }.items():
        np.testing.assert_array_equal(have[name], source[origin], err_msg=name)
    assert not have["roberta.embeddings.token_type_embeddings.weight"].any()
    assert (written.config["num_attention_heads"], written.config["hidden_dropout_prob"]) == (3, 0.2)
    assert type(modelzoo.from_hf(tmp_path / "out")[0]) is modelzoo.RobertaForMaskedLM


def test_names_what_is_wrong(tmp_path):
    def refuses(what, file):
        with pytest.raises((OSError, ValueError), match=what):
            convert("fairseq", file, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    tensors = model(ROOTS[0])
    save_tree(tmp_path / "a.pt", {"weights": tensors})
    refuses("not a fairseq checkpoint: it has no table `model`", tmp_path / "a.pt")
    refuses("no RoBERTa of fairseq", save(tmp_path / "b.pt", {"decoder.x": np.ones(2, np.float32)}))
    del tensors["decoder.lm_head.bias"]
    refuses("1 missing, such as lm_head.bias", save(tmp_path / "c.pt", tensors))
    refuses("not a file", tmp_path)

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import modelzoo
from modelzoo import hf_match, registry
from modelzoo.tensor_files import TensorRef
from modelzoo.weights import bind, flatten

CONFIG = modelzoo.get_config("tiny-gptj")
TABLE = registry.get_family("gptj").weights
FOLDER = Path("/the/folder")


def shapes_of(cls):
    return flatten(modelzoo.abstract_params(cls(CONFIG)))


def refs_of(cls, dtype=np.float32):
    return {
        tensor.name: TensorRef(FOLDER / "f", 0, np.dtype(dtype), tensor.shape, tensor.shape)
        for tensor in bind(TABLE, shapes_of(cls))
    }


def match(cls, refs, other_class=False):
    return hf_match.match_tensors(FOLDER, cls, TABLE, shapes_of(cls), refs, other_class)


def test_choose_class():
    def choose(model_class=None, **hf_config):
        return hf_match.choose_class(hf_config, model_class)[1].__name__

    assert choose(model_type="gptj", architectures=["GPTJForCausalLM"]) == "GPTJForCausalLM"
    assert choose(model_type="gptj", architectures=["Unheard", "GPTJModel"]) == "GPTJModel"
    assert choose(architectures=["GPTJForQuestionAnswering"]) == "GPTJForQuestionAnswering"
    assert choose(model_type="gptj") == "GPTJModel"
    assert choose("GPTJForCausalLM", model_type="gptj", architectures=["Unheard"]) == "GPTJForCausalLM"
    assert choose(modelzoo.GPTJModel, model_type="gptj", architectures=["GPTJForCausalLM"]) == "GPTJModel"
    with pytest.raises(ValueError, match=r"unknown model_type 'gpt9': flaxtron has \[.*'gptj'"):
        choose(model_type="gpt9", architectures=["GPTJModel"])
    with pytest.raises(ValueError, match=r"unknown architecture 'GPTJForNothing'.*GPTJForCausalLM"):
        choose(model_type="gptj", architectures=["GPTJForNothing"])
    with pytest.raises(ValueError, match="neither a known model_type nor"):
        choose()
    with pytest.raises(ValueError, match="unknown model class 'GPTJ'"):
        choose("GPTJ", model_type="gptj")

    class Stranger(modelzoo.Model):
        pass

    with pytest.raises(ValueError, match="gptj checkpoint, which Stranger does not read"):
        choose(Stranger, model_type="gptj")


@pytest.mark.parametrize("cls", registry.get_family("gptj").classes, ids=lambda cls: cls.__name__)
def test_every_parameter_finds_its_tensors(cls):
    sources, new = match(cls, refs_of(cls))
    assert set(sources) == set(shapes_of(cls))
    assert new == []
    kernels = sources[next(path for path in sources if path[-2:] == ("query", "kernel"))]
    assert [source.tensor.layer for source in kernels] == list(range(CONFIG.n_layer))


def test_one_error_names_everything():
    refs = refs_of(modelzoo.GPTJForCausalLM)
    del refs["transformer.h.1.mlp.fc_in.bias"], refs["lm_head.bias"]
    refs["transformer.h.2.ln_1.weight"] = refs["transformer.h.0.ln_1.weight"]
    refs["stranger"] = refs["transformer.ln_f.bias"]
    refs["transformer.wte.weight"] = TensorRef(FOLDER, 0, np.dtype(np.float32), (3, 64), (64, 1))
    refs["transformer.ln_f.bias"] = TensorRef(FOLDER, 0, np.dtype(np.int32), (64,), (1,))
    with pytest.raises(ValueError, match="2 missing") as error:
        match(modelzoo.GPTJForCausalLM, refs)
    first, *rest = str(error.value).splitlines()
    for part in (
        str(FOLDER),
        "GPTJForCausalLM",
        "2 unexpected",
        "1 wrong-shaped",
        "1 wrong-typed",
        "transformer.h.1.mlp.fc_in.bias",
    ):
        assert part in first
    assert [line.strip() for line in rest] == [
        "missing: transformer.h.1.mlp.fc_in.bias",
        "missing: lm_head.bias",
        "unexpected: transformer.h.2.ln_1.weight",
        "unexpected: stranger",
        "wrong-shaped: transformer.wte.weight is [3, 64], where the config makes it [256, 64]",
        "wrong-typed: transformer.ln_f.bias holds int32, where floating-point numbers belong",
    ]


def test_buffers_of_old_versions_are_ignored():
    refs = refs_of(modelzoo.GPTJForCausalLM)
    some = refs["transformer.ln_f.bias"]
    for name in ("attn.bias", "attn.masked_bias", "attn.embed_positions"):
        refs[f"transformer.h.0.{name}"] = some
    plain, _ = match(modelzoo.GPTJForCausalLM, refs_of(modelzoo.GPTJForCausalLM))
    sources, new = match(modelzoo.GPTJForCausalLM, refs)
    assert sources.keys() == plain.keys()
    assert not new
    bare = {
        name.removeprefix("transformer."): ref for name, ref in refs.items() if not name.startswith("lm_head")
    }
    _, new = match(modelzoo.GPTJModel, bare)
    assert not new


def test_a_bare_trunk_goes_into_a_head(caplog):
    with caplog.at_level(logging.WARNING, "modelzoo.hf"):
        sources, new = match(modelzoo.GPTJForCausalLM, refs_of(modelzoo.GPTJModel), other_class=True)
    assert new == [("lm_head", "kernel"), ("lm_head", "bias")]
    assert ("trunk", "embed", "embedding") in sources
    assert "newly initialised, to be trained: lm_head.weight, lm_head.bias" in caplog.text


def test_another_head_makes_room(caplog):
    with caplog.at_level(logging.WARNING, "modelzoo.hf"):
        _, new = match(
            modelzoo.GPTJForSequenceClassification, refs_of(modelzoo.GPTJForCausalLM), other_class=True
        )
        assert new == [("score", "kernel")]
        _, new = match(modelzoo.GPTJModel, refs_of(modelzoo.GPTJForCausalLM), other_class=True)
        assert new == []
    assert "GPTJModel leaves out lm_head.weight, lm_head.bias" in caplog.text


def test_a_head_is_new_only_where_all_of_it_is_absent():
    refs = refs_of(modelzoo.GPTJForCausalLM)
    del refs["lm_head.bias"]
    with pytest.raises(ValueError, match=r"missing, such as lm_head\.bias"):
        match(modelzoo.GPTJForCausalLM, refs, other_class=True)
    del refs["lm_head.weight"]
    with pytest.raises(ValueError, match="2 missing"):  # the checkpoint says that it is this class
        match(modelzoo.GPTJForCausalLM, refs, other_class=False)
    del refs["transformer.ln_f.weight"]
    with pytest.raises(ValueError, match="1 missing"):
        match(modelzoo.GPTJForCausalLM, refs, other_class=True)


def test_stored_dtype():
    def ref(name):
        return TensorRef(FOLDER, 0, np.dtype(name), (1,), (1,))

    assert hf_match.stored_dtype([ref("float16")] * 2, None) == np.float16
    assert hf_match.stored_dtype([ref("bfloat16"), ref("float32")], None) == np.float32
    assert hf_match.stored_dtype([ref("float64")], None) == np.float32
    assert hf_match.stored_dtype([ref("float64")], np.dtype("bfloat16")) == np.dtype("bfloat16")
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*pass param_dtype"):
        hf_match.stored_dtype([ref("float8_e4m3fn")], None)


def check(**changes):
    model = modelzoo.GPTJForQuestionAnswering(CONFIG)
    shapes = shapes_of(modelzoo.GPTJForQuestionAnswering)
    leaves: Any = {path: {None: np.zeros(spec.shape, np.float32)} for path, spec in shapes.items()}
    for path, held in changes.items():
        key = tuple(path.split("__"))
        leaves.pop(key, None)
        leaves |= {key: held} if held is not None else {}
    hf_match.check_params(model, shapes, leaves)


def test_check_params():
    rows = {0: np.zeros(64), 1: np.zeros(64)}
    check()
    check(trunk__layers__norm__scale=rows)
    check(trunk__embed__embedding={None: np.zeros((264, 64))})  # padded by a mesh
    wrong = {
        "trunk.final_norm.scale is missing": dict(trunk__final_norm__scale=None),
        "stray.thing is not a parameter": dict(stray__thing={None: np.zeros(1)}),
        "norm.scale has 1 layers of 2": dict(trunk__layers__norm__scale={0: np.zeros(64)}),
        r"norm.scale is \[63\], not \[64\]": dict(trunk__layers__norm__scale=rows | {1: np.zeros(63)}),
        r"embedding is \[255, 64\], not \[256, 64\]": dict(
            trunk__embed__embedding={None: np.zeros((255, 64))}
        ),
        r"qa_outputs.kernel is \[64, 3\]": dict(qa_outputs__kernel={None: np.zeros((64, 3))}),
    }
    for what, change in wrong.items():
        with pytest.raises(ValueError, match="not parameters of GPTJForQuestionAnswering.*" + what):
            check(**change)
    with pytest.raises(ValueError, match=r"bias is missing; .*scale is missing"):
        check(trunk__final_norm__scale=None, trunk__final_norm__bias=None)


def test_parameters_on_other_processes_cannot_be_written(monkeypatch):
    array = jax.device_put(np.zeros(64, np.float32))
    monkeypatch.setattr(type(array), "is_fully_addressable", property(lambda self: False))
    with pytest.raises(ValueError, match="spread over processes"):
        check(trunk__final_norm__scale={None: array})

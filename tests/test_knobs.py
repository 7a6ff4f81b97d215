"""Fields of configs that no Hugging Face file knows: off by default and unwritten, checked, kept by our checkpoints."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from modelzoo import registry
from modelzoo.knobs import KNOBS
from modelzoo.layers.mlp import usual_hidden
from modelzoo.peft import write_adapter
from parallel.checkpoint import texts_of
from tests.zoo import assert_close, leaves_by_name, quick_jit, random_params, tiny_gptj


def bloom(**fields: Any) -> modelzoo.BloomConfig:
    return modelzoo.BloomConfig(**dict(vocab_size=37, hidden_size=24, n_layer=1, n_head=4) | fields)


MANY: Any = dict(position="learned", block="sequential", norm="rms", qk_norm=True, num_key_value_heads=1)


@pytest.mark.parametrize("family", registry.FAMILIES.values(), ids=registry.FAMILIES)
def test_knobs_are_off_and_unwritten(family):
    for preset in family.presets.values():
        assert preset.knobs_on == {}
        assert not set(preset.to_hf()) & {*KNOBS, *preset.knobs}


def test_knobs_on_are_written_and_read():
    for config in (
        tiny_gptj(**MANY),
        bloom(norm_placement="post"),
        bloom(**MANY | dict(block="parallel"), max_position_embeddings=7),
    ):
        written = json.loads(json.dumps(config.to_hf()))
        assert type(config).from_hf(written) == config
        assert set(written) & {*KNOBS, *config.knobs} == set(config.knobs_on)
    assert tiny_gptj(**MANY).knobs_on == MANY


def test_what_a_family_has_anyway_is_off():
    """So that an arm of a study which names the family's own value is that family, file and all."""
    same: Any = dict(position="rotary", block="parallel", norm_placement="pre", norm="layer", qk_norm=False)
    assert tiny_gptj(**same) == tiny_gptj()
    assert tiny_gptj(num_key_value_heads=3).knobs_on == {}
    models = [modelzoo.GPTJModel(tiny_gptj(num_key_value_heads=heads)) for heads in (None, 3)]
    assert modelzoo.logical_axes(models[0]) == modelzoo.logical_axes(models[1])


@pytest.mark.parametrize(
    ("make", "field", "value", "why"),
    [
        (
            tiny_gptj,
            "position",
            "sinusoidal",
            r"choose from \('rotary', 'alibi', 'learned', 'relative', 'none'\)",
        ),
        (tiny_gptj, "block", "serial", r"choose from \('sequential', 'parallel'\)"),
        (bloom, "norm_placement", "sandwich", r"choose from \('pre', 'post'\)"),
        (bloom, "norm", "batch", r"choose from \('layer', 'rms'\)"),
        (bloom, "norm", None, "choose from"),
        (bloom, "qk_norm", 1, "it is of type bool"),
        (tiny_gptj, "num_key_value_heads", 2, "it divides the 3 heads of queries"),
        (bloom, "num_key_value_heads", 0, "it divides the 4 heads of queries"),
        (bloom, "num_key_value_heads", 8, "it divides the 4 heads of queries"),
        (bloom, "position", "learned", "its table has a row for each position: set max_position_embeddings"),
        (bloom, "position", "relative", "its table has a row for each position: set max_position_embeddings"),
        (bloom, "max_position_embeddings", 0, "at least 1, or None for no limit"),
    ],
)
def test_a_value_that_cannot_be_names_its_field(make, field, value, why):
    with pytest.raises(ValueError, match=rf"Config\.{field} = {value!r}: .*{why}"):
        make(**{field: value})


def test_knobs_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"position = 'rotary': features rotate in pairs, and a head has 3"):
        bloom(n_head=8, position="rotary")
    with pytest.raises(
        ValueError, match=r"norm_placement = 'post': with apply_residual_connection_post_layernorm"
    ):
        bloom(norm_placement="post", apply_residual_connection_post_layernorm=True)


def test_hugging_face_has_no_such_model(tmp_path):
    for config, message in (
        (
            tiny_gptj(position="alibi"),
            r"GPTJConfig\.position = 'alibi': Hugging Face has no such model, so no",
        ),
        (
            tiny_gptj(activation_function="swiglu"),
            r"activation_function = 'swiglu': Hugging Face has no such",
        ),
        (tiny_gptj(norm="rms", qk_norm=True), r"norm = 'rms': .* no such model \(nor with qk_norm\)"),
    ):
        model = modelzoo.GPTJModel(config)
        with pytest.raises(ValueError, match=message):
            modelzoo.to_hf(model, modelzoo.abstract_params(model), tmp_path / "out")
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
        with pytest.raises(ValueError, match=message):
            modelzoo.from_hf(tmp_path)
        adapted = modelzoo.tuned(
            model, modelzoo.Tuning(lora=modelzoo.Lora(rank=1, alpha=1, targets=".*query.*"))
        )
        with pytest.raises(ValueError, match=message):
            write_adapter(adapted, modelzoo.abstract_params(adapted), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_gptj_has_files(tmp_path):
    model = modelzoo.GPTJForCausalLM(tiny_gptj(tie_word_embeddings=True))
    params = random_params(model)
    assert set(params["lm_head"]) == {"bias"}
    modelzoo.to_hf(model, params, tmp_path)
    read, again = modelzoo.from_hf(tmp_path)
    assert read.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))


def test_a_checkpoint_holds_its_knobs():
    model = modelzoo.GPTJForCausalLM(tiny_gptj(**MANY, norm_placement="post"))
    content = json.loads(texts_of(model)["config.json"])
    assert modelzoo.GPTJConfig.from_hf(content) == model.config


def test_parameters_follow_the_knobs():
    def names(config: Any) -> set[str]:
        return set(leaves_by_name(modelzoo.abstract_params(modelzoo.GPTJModel(config))))

    plain = names(tiny_gptj())
    layer = "layers"
    changed = {
        ("block", "sequential"): (
            {f"{layer}/norm/{p}" for p in ("scale", "bias")},
            {f"{layer}/{norm}/{p}" for norm in ("attention_norm", "mlp_norm") for p in ("scale", "bias")},
        ),
        ("norm_placement", "post"): ({"final_norm/scale", "final_norm/bias"}, set()),
        ("norm", "rms"): ({f"{layer}/norm/bias", "final_norm/bias"}, set()),
        ("position", "learned"): (set(), {"embed_positions/embedding"}),
        ("position", "relative"): (set(), {f"{layer}/attention/distance"}),
        ("position", "none"): (set(), set()),
        ("qk_norm", True): (set(), {f"{layer}/attention/{of}_norm/scale" for of in ("query", "key")}),
        ("activation_function", "swiglu"): (set(), {f"{layer}/mlp/fc_gate/{p}" for p in ("kernel", "bias")}),
    }
    for (field, value), (without, more) in changed.items():
        assert names(tiny_gptj(**{field: value})) == plain - without | more, field


def test_encoders_take_what_their_shape_allows():
    knobs: Any = dict(norm="rms", qk_norm=True, num_key_value_heads=2, hidden_act="swiglu")
    config = modelzoo.get_config("tiny-roberta", norm_placement="pre", **knobs)
    assert config.knobs_on == knobs | dict(norm_placement="pre")
    shapes = leaves_by_name(modelzoo.abstract_params(modelzoo.RobertaForMaskedLM(config)))
    assert {name for name in shapes if "norm/" in name} == {
        *(f"trunk/{name}_norm/scale" for name in ("embed", "final")),
        *(f"trunk/layers/{name}_norm/scale" for name in ("attention", "mlp")),
        *(f"trunk/layers/attention/{name}_norm/scale" for name in ("query", "key")),
        "lm_head/norm/scale",
    }
    assert shapes["trunk/layers/attention/value/kernel"].shape == (2, 64, 2, 16)
    assert shapes["trunk/layers/mlp/fc_gate/kernel"].shape == (2, 64, 256)
    post = modelzoo.MegatronBertModel(modelzoo.get_config("tiny-megatron-bert", norm_placement="post"))
    assert "final_norm" not in modelzoo.abstract_params(post)
    mvp = modelzoo.abstract_params(
        modelzoo.MvpModel(modelzoo.get_config("tiny-mvp", norm="rms", qk_norm=True))
    )
    assert {"query_norm", "key_norm"} <= set(mvp["decoder"]["layers"]["cross_attention"])
    assert not [name for name in leaves_by_name(mvp) if name.endswith("norm/bias")]
    with pytest.raises(ValueError, match="MvpConfig has no field 'position': it has"):
        modelzoo.get_config("tiny-mvp", position="alibi")


@pytest.mark.parametrize("preset", ["tiny-roberta", "tiny-megatron-bert"])
def test_a_decoding_encoder_with_knobs(preset):
    """Cached and at once, with the placement that the family has not."""
    knobs: Any = dict(norm="rms", qk_norm=True, num_key_value_heads=2, hidden_act="geglu", is_decoder=True)
    knobs |= dict(norm_placement="pre" if "roberta" in preset else "post", num_hidden_layers=1)
    config = modelzoo.get_config(preset, position_embedding_type="relative_key_query", **knobs)
    model: Any = getattr(modelzoo, f"{type(config).__name__.removesuffix('Config')}ForCausalLM")(config)
    params = random_params(model)

    @quick_jit
    def run(ids: jax.Array) -> Any:
        def apply(ids: jax.Array, cache: Any = None) -> Any:
            return model.apply({"params": params}, input_ids=ids, cache=cache)

        first = apply(ids[:, :5], model.init_cache(2, 9))
        return jnp.concatenate([first.logits, apply(ids[:, 5:], first.cache).logits], axis=1), apply(
            ids
        ).logits

    cached, whole = run(jnp.asarray(np.random.default_rng(0).integers(5, 256, (2, 8)), jnp.int32))
    assert np.isfinite(whole).all()
    assert_close(cached, whole, 2e-6 * float(jnp.abs(whole).max()))


def test_the_width_of_a_gated_mlp():
    """As many parameters as an ungated one has, but for rounding up."""
    assert [usual_hidden(width, "swiglu") for width in (24, 192, 768, 4096)] == [64, 512, 2048, 10944]
    assert tiny_gptj(n_inner=None, activation_function="swiglu").mlp_dim == 64
    assert tiny_gptj(activation_function="swiglu").mlp_dim == tiny_gptj().mlp_dim == 31
    assert (bloom().mlp_dim, bloom(activation_function="swiglu").mlp_dim) == (96, 64)


def test_tensor_parallelism_divides_the_heads_of_keys_and_values():
    model = modelzoo.BloomForCausalLM(bloom(num_key_value_heads=2))
    assert modelzoo.logical_axes(model)["trunk"]["layers"]["attention"]["key"]["kernel"] == (
        *("layers", "embed", "kv"),
        "head_dim",
    )
    rules = parallel.make_rules(parallel.make_mesh(tensor=4, devices=jax.devices()[:4]))
    with pytest.raises(ValueError, match="'kv' has size 2, which mesh tensor=4 does not divide.* tensor=2"):
        parallel.param_shardings(model, rules)


def test_presets_take_knobs():
    config = modelzoo.get_config("gpt-j-6b", position="alibi", num_key_value_heads=4)
    assert config.cache_heads == (4, 256)
    assert dataclasses.replace(config, num_key_value_heads=None).cache_heads == (16, 256)

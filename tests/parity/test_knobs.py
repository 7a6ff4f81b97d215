"""Decoders and encoders with knobs on, against the architectures of transformers that have what the knobs say.

GPT-J's config then makes Qwen3, GPT-2 and the first GPT; their weights are copied over, and what GPT-J lacks (a bias on
the attention's projections) or has alone (one on the LM head) is zero. Of Qwen3, which rotates the halves of a head,
queries and keys are laid out anew as the neighbouring pairs that GPT-J rotates: scores do not change.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import modelzoo
from modelzoo.layers import norm
from tests.zoo import quick_jit

V, D, L, N, K, F = 41, 32, 2, 4, 2, 40
H = D // N
SIZES: Any = dict(vocab_size=V, n_embd=D, n_layer=L, n_head=N, n_inner=F, n_positions=24, rotary_dim=None)
TOLERANCE = 2e-5


def draw(model: torch.nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Fills a model with weights of unit scale, norms around one; {name: weight}."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if "norm" in name.lower() or ".ln_" in name:
                parameter.add_(1.0)
            if "attn" in name and name.endswith("bias"):
                parameter.zero_()
    model.eval()
    return {name: weight.detach().numpy() for name, weight in model.state_dict().items()}


def rows() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(0, V, (2, 11))
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def check(theirs: torch.nn.Module, config: Any, params: Any) -> None:
    """Logits of a batch with padding on the left, and the gradient of a loss by the embeddings."""
    model: Any = modelzoo.GPTJForCausalLM(config)
    shapes = jax.tree.map(lambda leaf: leaf.shape, modelzoo.abstract_params(model))
    assert jax.tree.map(jnp.shape, params) == shapes
    ids, mask = rows()

    def loss(params: Any) -> Any:
        out = model.apply(
            {"params": params},
            input_ids=jnp.asarray(ids, jnp.int32),
            attention_mask=jnp.asarray(mask, jnp.int32),
        )
        right = jax.nn.log_softmax(out.logits)[..., 5] * jnp.asarray(mask, jnp.float32)
        return -jnp.mean(right), out.logits

    (_, logits), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    given = torch.from_numpy(ids), torch.from_numpy(mask)
    expected = theirs(given[0], attention_mask=given[1], position_ids=torch.arange(11)[None])
    real = mask > 0
    np.testing.assert_allclose(
        np.asarray(logits)[real], expected.logits.detach().numpy()[real], atol=TOLERANCE
    )
    (-torch.mean(expected.logits.log_softmax(-1)[..., 5] * given[1])).backward()
    table = theirs.get_input_embeddings().weight.grad.numpy()
    ours = gradient["trunk"]["embed"]["embedding"]
    np.testing.assert_allclose(ours, table, atol=1e-5 * np.abs(table).max())


def stacked(make: Callable[[int], Any]) -> Any:
    return jax.tree.map(lambda *layers: jnp.asarray(np.stack(layers)), *(make(i) for i in range(L)))


def test_qwen3_is_sequential_rotary_grouped_normed_gated():
    """RMS norm, SwiGLU, grouped heads, and normed queries and keys before they rotate (Qwen3: arXiv:2505.09388)."""
    sizes = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N, head_dim=H)
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=V,
            num_key_value_heads=K,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=False,
            attn_implementation="eager",
            **sizes,
        )
    )
    weights = draw(theirs)
    pairs = np.arange(H).reshape(2, H // 2).T.reshape(-1)  # halves to neighbours: 0, H/2, 1, H/2 + 1, ...

    def layer(i: int) -> Any:
        w = {name.removeprefix(f"model.layers.{i}."): value for name, value in weights.items()}

        def heads(name: str, turns: bool) -> Any:
            kernel = w[f"self_attn.{name}_proj.weight"].T.reshape(D, -1, H)
            return {"kernel": kernel[..., pairs] if turns else kernel}

        def dense(name: str, bias: int) -> Any:
            return {"kernel": w[f"mlp.{name}_proj.weight"].T, "bias": np.zeros(bias, np.float32)}

        return {
            "attention": {
                "query": heads("q", True),
                "key": heads("k", True),
                "value": heads("v", False),
                "query_norm": {"scale": w["self_attn.q_norm.weight"][pairs]},
                "key_norm": {"scale": w["self_attn.k_norm.weight"][pairs]},
                "out": {"kernel": w["self_attn.o_proj.weight"].T.reshape(N, H, D)},
            },
            "attention_norm": {"scale": w["input_layernorm.weight"]},
            "mlp_norm": {"scale": w["post_attention_layernorm.weight"]},
            "mlp": {"fc_gate": dense("gate", F), "fc_in": dense("up", F), "fc_out": dense("down", D)},
        }

    params = {
        "trunk": {
            "embed": {"embedding": weights["model.embed_tokens.weight"]},
            "layers": stacked(layer),
            "final_norm": {"scale": weights["model.norm.weight"]},
        },
        "lm_head": {"kernel": weights["lm_head.weight"].T, "bias": np.zeros(V, np.float32)},
    }
    config = modelzoo.GPTJConfig(
        block="sequential",
        norm="rms",
        qk_norm=True,
        num_key_value_heads=K,
        activation_function="swiglu",
        **SIZES,
    )
    check(theirs, config, jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize(
    ("name", "placement"),
    [("GPT2LMHeadModel", "pre"), ("OpenAIGPTLMHeadModel", "post")],
    ids=["gpt-2", "gpt"],
)
def test_gpts_are_sequential_learned_tied(name, placement):
    """GPT-2 norms what it reads, its predecessor each sum of a residual."""
    model_class = getattr(transformers, name)
    options = dict(n_inner=F) if placement == "pre" else {}
    hidden = F if placement == "pre" else 4 * D
    theirs = model_class(
        model_class.config_class(
            vocab_size=V,
            n_positions=24,
            n_embd=D,
            n_layer=L,
            n_head=N,
            attn_implementation="eager",
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **options,
        )
    )
    weights = draw(theirs)
    embed, positions = ("wte", "wpe") if placement == "pre" else ("tokens_embed", "positions_embed")

    def layer(i: int) -> Any:
        w = {name.removeprefix(f"transformer.h.{i}."): value for name, value in weights.items()}
        fused = np.moveaxis(w["attn.c_attn.weight"].reshape(D, 3, N, H), 1, 0)

        def affine(name: str) -> Any:
            return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

        def dense(name: str) -> Any:
            return {"kernel": w[f"mlp.{name}.weight"], "bias": w[f"mlp.{name}.bias"]}

        heads = {
            part: {"kernel": kernel} for part, kernel in zip(("query", "key", "value"), fused, strict=True)
        }
        return {
            "attention": heads | {"out": {"kernel": w["attn.c_proj.weight"].reshape(N, H, D)}},
            "attention_norm": affine("ln_1"),
            "mlp_norm": affine("ln_2"),
            "mlp": {"fc_in": dense("c_fc"), "fc_out": dense("c_proj")},
        }

    trunk = {
        "embed": {"embedding": weights[f"transformer.{embed}.weight"]},
        "embed_positions": {"embedding": weights[f"transformer.{positions}.weight"]},
        "layers": stacked(layer),
    }
    if placement == "pre":
        ends = (weights[f"transformer.ln_f.{part}"] for part in ("weight", "bias"))
        trunk["final_norm"] = dict(zip(("scale", "bias"), ends, strict=True))
    params = {"trunk": trunk, "lm_head": {"bias": np.zeros(V, np.float32)}}
    config = modelzoo.GPTJConfig(
        position="learned",
        block="sequential",
        norm_placement=placement,
        tie_word_embeddings=True,
        **SIZES | dict(n_inner=hidden),
    )
    check(theirs, config, jax.tree.map(jnp.asarray, params))


def test_a_tied_gptj_is_theirs(tmp_path):
    """In and out of files: what GPT-J's config has always been able to say."""
    sizes = {name: value for name, value in SIZES.items() if name != "rotary_dim"}
    config = transformers.GPTJConfig(
        **sizes, rotary_dim=4, tie_word_embeddings=True, attn_implementation="eager"
    )
    theirs = transformers.GPTJForCausalLM(config)
    draw(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = modelzoo.from_hf(tmp_path / "theirs")
    assert model.config.tie_word_embeddings
    check(theirs, model.config, params)
    modelzoo.to_hf(model, params, tmp_path / "ours")
    again = transformers.GPTJForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_a_roberta_with_norms_first_is_theirs():
    """transformers has it as RobertaPreLayerNorm (from fairseq): files of RoBERTa's names, but for the norms."""
    sizes = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N)
    sizes |= dict(vocab_size=V, max_position_embeddings=20, type_vocab_size=2, layer_norm_eps=1e-5)
    config = transformers.RobertaPreLayerNormConfig(**sizes, attn_implementation="eager")
    theirs = transformers.RobertaPreLayerNormModel(config, add_pooling_layer=False)
    weights = {name: jnp.asarray(value) for name, value in draw(theirs).items()}

    def affine(name: str) -> Any:
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def dense(name: str) -> Any:
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def layer(i: int) -> Any:
        at = f"encoder.layer.{i}"

        def heads(name: str) -> Any:
            d = dense(f"{at}.attention.self.{name}")
            return {"kernel": d["kernel"].reshape(D, N, H), "bias": d["bias"].reshape(N, H)}

        out = dense(f"{at}.attention.output.dense")
        attention = {name: heads(name) for name in ("query", "key", "value")}
        attention["out"] = {"kernel": out["kernel"].reshape(N, H, D), "bias": out["bias"]}
        return {
            "attention": attention,
            "attention_norm": affine(f"{at}.attention.LayerNorm"),
            "mlp_norm": affine(f"{at}.intermediate.LayerNorm"),
            "mlp": {"fc_in": dense(f"{at}.intermediate.dense"), "fc_out": dense(f"{at}.output.dense")},
        }

    tables = {"embed": "word", "embed_types": "token_type", "embed_positions": "position"}
    params: Any = {
        ours: {"embedding": weights[f"embeddings.{name}_embeddings.weight"]} for ours, name in tables.items()
    }
    params |= {"embed_norm": affine("embeddings.LayerNorm"), "final_norm": affine("LayerNorm")}
    params["layers"] = stacked(layer)
    ours: Any = modelzoo.RobertaModel(
        modelzoo.RobertaConfig(norm_placement="pre", **sizes), add_pooling_layer=False
    )
    ids, mask = rows()
    ids = np.where(mask > 0, ids, 1)  # RoBERTa counts positions from what is not padding
    states = quick_jit(functools.partial(ours.apply))(
        {"params": params}, input_ids=jnp.asarray(ids, jnp.int32), attention_mask=jnp.asarray(mask, jnp.int32)
    ).last_hidden_state
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
    np.testing.assert_allclose(np.asarray(states)[mask > 0], expected.numpy()[mask > 0], atol=TOLERANCE)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
def test_rms_norm_is_torchs(epsilon):
    x = np.random.default_rng(0).normal(1.0, 2.0, (3, 5, 24)).astype(np.float32)
    theirs = torch.nn.RMSNorm(24, eps=epsilon)
    weights = draw(theirs)
    given = torch.from_numpy(x).requires_grad_()
    expected = theirs(given)
    (expected**3).sum().backward()
    module: Any = norm.RMSNorm(24, epsilon)
    params = {"scale": jnp.asarray(weights["weight"])}

    def cubes(params: Any, x: Any) -> Any:
        y = module.apply({"params": params}, x)
        return jnp.sum(y**3), y

    (_, y), (d_params, d_x) = jax.value_and_grad(cubes, argnums=(0, 1), has_aux=True)(params, jnp.asarray(x))
    np.testing.assert_allclose(y, expected.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(d_x, given.grad.numpy(), atol=2e-5)
    np.testing.assert_allclose(d_params["scale"], theirs.weight.grad.numpy(), rtol=2e-5, atol=1e-4)

"""MVP's files: the embedding table under its many names, the buffer, config.json."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import modelzoo
from tests.zoo import assert_close, random_params, tiny_mvp

MODEL: Any = modelzoo.MvpForConditionalGeneration(tiny_mvp())
PARAMS = random_params(MODEL)


class TestFiles:
    """The embedding table under its many names."""

    def save(self, folder, model, params, change):
        """What `to_hf` writes, with its tensors changed."""
        modelzoo.to_hf(model, params, folder)
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    @pytest.mark.parametrize(
        "name", ["encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]
    )
    def test_any_of_them_will_do(self, tmp_path, name):
        def renamed(tensors):
            return {name if key == "shared.weight" else key: tensor for key, tensor in tensors.items()}

        model: Any = modelzoo.MvpModel(tiny_mvp())
        params = random_params(model)
        self.save(tmp_path, model, params, renamed)
        _, read = modelzoo.from_hf(tmp_path)
        assert_close(read, params, 0.0)

    def test_the_decoder_of_a_whole_model(self, tmp_path, caplog):
        """Its table is the shared one; the encoder is left out, the copies are not."""
        modelzoo.to_hf(MODEL, PARAMS, tmp_path)
        model, read = modelzoo.from_hf(tmp_path, "MvpForCausalLM")
        np.testing.assert_array_equal(
            read["trunk"]["embed"]["embedding"], PARAMS["trunk"]["embed"]["embedding"]
        )
        assert_close(read["trunk"]["decoder"]["layers"], PARAMS["trunk"]["decoder"]["layers"], 0.0)
        assert "model.encoder.embed_positions.weight" in caplog.text
        assert "shared" not in caplog.text
        modelzoo.to_hf(model, read, tmp_path / "again")
        written = load_file(tmp_path / "again" / "model.safetensors")
        assert "model.decoder.embed_tokens.weight" in written
        assert "model.shared.weight" not in written

    def test_an_untied_head_is_no_copy(self, tmp_path):
        model: Any = modelzoo.MvpForConditionalGeneration(tiny_mvp(tie_word_embeddings=False))
        params = random_params(model)

        def without_tables(tensors):
            tables = ("shared", "embed_tokens")
            return {key: tensor for key, tensor in tensors.items() if not any(name in key for name in tables)}

        self.save(tmp_path, model, params, without_tables)
        with pytest.raises(ValueError, match=r"1 missing, such as model\.shared\.weight"):
            modelzoo.from_hf(tmp_path)

    def test_untied_the_table_is_written_for_each_stack(self, tmp_path):
        """For transformers 5, which ties none of the tables then."""
        model = modelzoo.MvpModel(tiny_mvp(tie_word_embeddings=False))
        params = random_params(model)
        modelzoo.to_hf(model, params, tmp_path)
        written = load_file(tmp_path / "model.safetensors")
        for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            np.testing.assert_array_equal(written[name], params["embed"]["embedding"])
        assert_close(modelzoo.from_hf(tmp_path)[1], params, 0.0)

    def test_the_buffer_goes_along(self, tmp_path):
        modelzoo.to_hf(MODEL, PARAMS, tmp_path)
        written = load_file(tmp_path / "model.safetensors")["final_logits_bias"]
        np.testing.assert_array_equal(written, PARAMS["final_logits_bias"][None])
        trunk = modelzoo.MvpModel(tiny_mvp())
        modelzoo.to_hf(trunk, PARAMS["trunk"], tmp_path / "trunk")
        _, read = modelzoo.from_hf(tmp_path / "trunk", "MvpForConditionalGeneration")
        assert (read["final_logits_bias"] == 0).all()


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value", "why"),
        [
            *(
                (name, 0, "a size, at least 1")
                for name in ("encoder_layers", "decoder_ffn_dim", "prompt_length")
            ),
            ("d_model", 25, "encoder_attention_heads = 3 does not divide it"),
            ("d_model", 27, "decoder_attention_heads = 4 does not divide it"),
            *(
                (name, 1.0, r"lies in \[0, 1\)")
                for name in ("dropout", "classifier_dropout", "decoder_layerdrop")
            ),
            ("pad_token_id", 37, "an id below vocab_size = 37"),
            ("decoder_start_token_id", -1, "an id below vocab_size = 37"),
        ],
    )
    def test_a_value_that_cannot_be_names_its_field(self, field, value, why):
        with pytest.raises(ValueError, match=rf"MvpConfig\.{field} = {value}: .*{why}"):
            tiny_mvp(**{field: value})

    def test_an_unknown_activation(self):
        with pytest.raises(ValueError, match="unknown activation 'geloo'"):
            tiny_mvp(activation_function="geloo")

    def test_sizes_are_the_decoders(self):
        config = tiny_mvp()
        assert (config.num_layers, config.hidden_size, config.max_positions) == (3, 24, 16)
        assert config.cache_heads == (4, 6)
        assert config.sizes("encoder") == (2, 3, 31)
        assert config.sizes("decoder") == (3, 4, 29)

    def test_old_files_spell_the_forced_token_otherwise(self):
        old = {"model_type": "mvp", "force_bos_token_to_be_generated": True, "bos_token_id": 5}
        assert modelzoo.MvpConfig.from_hf(old).forced_bos_token_id == 5
        assert modelzoo.MvpConfig.from_hf(old | {"forced_bos_token_id": 6}).forced_bos_token_id == 6
        assert modelzoo.MvpConfig.from_hf({}).forced_bos_token_id is None

    def test_files_round_trip(self):
        config = tiny_mvp(forced_bos_token_id=3, is_decoder=True, problem_type="regression")
        assert modelzoo.MvpConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
        assert dataclasses.asdict(modelzoo.get_config("mvp")) == dataclasses.asdict(modelzoo.MvpConfig())

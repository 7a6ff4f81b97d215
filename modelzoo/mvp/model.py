"""MVP: wiring only. References: Tang et al., 2022, arXiv:2206.12131, and transformers 4.57.6.

A BART: an encoder and a decoder that share one embedding table, with learned prompts where the config has them. What
is particular, as in transformers: without decoder inputs those are the encoder's (or the labels), shifted; a 4-D mask
of the decoder is of ones and zeros; a classifier reads the decoder at the last end token of the encoder's input; the
decoder alone (`MvpForCausalLM`) has no prompts, and its loss meets labels unshifted. MVP's documentation says that
padding in decoder_input_ids is hidden by default; its code, which counts, hides nothing. Departures: the encoder's
states are not needed again once a cache has seen them; an encoder's output may come in more forms.
"""

from typing import Any, ClassVar, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from modelzoo import heads, tasks
from modelzoo.layers.cache import Cache
from modelzoo.layers.embed import Embed, embed_inputs
from modelzoo.layers.linear import parameter
from modelzoo.model import Model, StackOptions, trainable
from modelzoo.mvp.inputs import as_encoder_output, last_end_token, shift_right
from modelzoo.mvp.stacks import MvpDecoder, MvpEncoder
from modelzoo.outputs import (
    BaseModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringOutput,
    Seq2SeqSequenceClassifierOutput,
)
from modelzoo.trunk import Trunk


class _Tunable(Model):
    """What all classes have: a say in which parameters train.

    Attributes:
        lightweight_tuning: only prompts train; see `set_lightweight_tuning`.
    """

    lightweight_tuning: bool = False

    def set_lightweight_tuning(self) -> Any:
        """This model with only its prompts to be trained (`modelzoo.trainable`); the parameters are the same ones.

        Raises:
            ValueError: it has no prompts.
        """
        model = self.clone(lightweight_tuning=True)
        if not any(jax.tree.leaves(trainable(model))):
            raise ValueError(
                f"{type(self).__name__} has no prompts to tune: set use_prompt in its config "
                "(MvpForCausalLM never has any)"
            )
        return model

    def is_frozen(self, path: tuple[str, ...]) -> bool:
        if self.lightweight_tuning:
            return not any(name in ("self_prompt", "cross_prompt") for name in path)
        return path == ("final_logits_bias",)


class _Trunk(_Tunable):
    """What both trunks have: the embedding table."""

    table_path: ClassVar[tuple[str, ...]] = Trunk.table_path

    @nn.nowrap
    def make_embed(self) -> Embed:
        """The embedding table."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        return Embed(c.vocab_size, c.d_model, "vocab", c.pad_token_id, init, self.dtype, self.param_dtype)

    def embedding_table(self) -> jax.Array:
        """The token embedding [V, D], which a head may be tied to."""
        return self.embed.embedding

    def embed_tokens(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        """[B, T, D] from ids, scaled where the config says so, or as it was passed."""
        x_BTD = embed_inputs(self.embed, input_ids, inputs_embeds)
        scales = self.config.scale_embedding and input_ids is not None
        return x_BTD * self.config.d_model**0.5 if scales else x_BTD


class MvpModel(_Trunk):
    """The trunk: one embedding table, an encoder, a decoder."""

    def setup(self) -> None:
        c = self.config
        self.embed = self.make_embed()
        self.encoder = self.build(MvpEncoder, layer_drop=c.encoder_layerdrop)
        self.decoder = self.build(MvpDecoder, layer_drop=c.decoder_layerdrop)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        decoder_head_mask: jax.Array | None = None,
        cross_attn_head_mask: jax.Array | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: jax.Array | None = None,
        decoder_inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        **options: Unpack[StackOptions],
    ) -> Seq2SeqModelOutput:
        """Runs encoder and decoder; S is the encoder's length, T the decoder's.

        Args:
            input_ids: [B, S]; also the decoder's input, shifted right, where that has none of its own.
            attention_mask: [B, S], non-zero where a token of the encoder is real; with every call, also a cached one.
            decoder_input_ids: [B, T].
            decoder_attention_mask: [B, T], non-zero where a token is real; see `MvpDecoder`.
            head_mask, decoder_head_mask, cross_attn_head_mask: [N] or [L, N], multiplied into the probabilities of the
                encoder's, the decoder's and the cross-attention.
            encoder_outputs: in place of running the encoder: see `as_encoder_output`.
            inputs_embeds: [B, S, D] in place of input_ids.
            decoder_inputs_embeds: [B, T, D] in place of decoder_input_ids.
            segment_ids, decoder_segment_ids: [B, S] and [B, T], which document of a packed row a token belongs to, for
                rows whose decoder's input is passed (shifting would carry a token from document to document).
            cache: from `init_cache` or an earlier call. After the first the encoder's part may be left out, since the
                cache holds what the decoder reads of it.
            options: see `StackOptions`.

        Raises:
            ValueError: nothing to encode, nothing to decode, or two forms of one of them.
        """
        if decoder_input_ids is not None and decoder_inputs_embeds is not None:
            raise ValueError("pass at most one of decoder_input_ids and decoder_inputs_embeds")
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "pass decoder_input_ids or decoder_inputs_embeds: there are no input_ids to shift"
                )
            if segment_ids is not None:
                raise ValueError("pass decoder_input_ids with segment_ids: shifting would mix documents")
            # What an initialisation decodes is all the same, and a config need not know a start token.
            decoder_input_ids = input_ids if self.is_initializing() else shift_right(input_ids, self.config)

        seen = cache is not None and cache.cross is not None
        encoded = None
        if encoder_outputs is not None:
            encoded = as_encoder_output(encoder_outputs)
        elif not seen or input_ids is not None or inputs_embeds is not None:
            x_BSD = self.embed_tokens(input_ids, inputs_embeds)
            encoded = self.encoder(x_BSD, attention_mask, head_mask, segment_ids, **options)
        decoded = self.decoder(
            self.embed_tokens(decoder_input_ids, decoder_inputs_embeds),
            decoder_attention_mask,
            None if encoded is None else encoded.last_hidden_state,
            attention_mask,
            decoder_head_mask,
            cross_attn_head_mask,
            cache,
            decoder_segment_ids,
            segment_ids,
            **options,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            cache=decoded.cache,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=None if encoded is None else encoded.last_hidden_state,
            encoder_hidden_states=None if encoded is None else encoded.hidden_states,
            encoder_attentions=None if encoded is None else encoded.attentions,
        )


class MvpDecoderModel(_Trunk):
    """The decoder alone, with a table of its own: the trunk of `MvpForCausalLM`."""

    def setup(self) -> None:
        self.embed = self.make_embed()
        self.decoder = self.build(MvpDecoder, layer_drop=self.config.decoder_layerdrop, has_prompts=False)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        encoder_hidden_states: jax.Array | None = None,
        encoder_attention_mask: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        cross_attn_head_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        **options: Unpack[StackOptions],
    ) -> BaseModelOutput:
        """Runs the decoder; without encoder_hidden_states [B, S, D] its cross-attention is left out.

        See `MvpModel`, whose decoder's arguments these are under shorter names.
        """
        return self.decoder(
            self.embed_tokens(input_ids, inputs_embeds),
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            head_mask,
            cross_attn_head_mask,
            cache,
            segment_ids,
            **options,
        )


def _rest(out: Seq2SeqModelOutput) -> dict[str, Any]:
    """What a head hands on of its trunk's output."""
    return {name: value for name, value in vars(out).items() if name != "last_hidden_state"}


class MvpForConditionalGeneration(_Tunable, tasks.Task):
    """MVP with a language-modelling head on its decoder."""

    task: ClassVar[str] = "seq2seq_lm"
    trunk_class = MvpModel

    def setup(self) -> None:
        super().setup()
        self.lm_head = self.make_lm_head()
        shape, zeros = (self.config.vocab_size,), nn.initializers.zeros
        self.final_logits_bias = parameter(
            self, "final_logits_bias", zeros, shape, ("vocab",), self.param_dtype, self.dtype
        )

    def __call__(
        self, input_ids: jax.Array | None = None, labels: jax.Array | None = None, **inputs: Any
    ) -> Seq2SeqLMOutput:
        """Runs trunk and head; `inputs` are the trunk's.

        Args:
            input_ids: [B, S].
            labels: [B, T], what `train.loss` will hold the logits against: the decoder's input, shifted right, where it
                has no other.
            inputs: see `MvpModel`.
        """
        decodes = ("decoder_input_ids", "decoder_inputs_embeds")
        if labels is not None and all(inputs.get(name) is None for name in decodes):
            inputs["decoder_input_ids"] = shift_right(labels, self.config)
        out = self.trunk(input_ids, **inputs)
        logits = self.lm_head(out.last_hidden_state, self.trunk.embedding_table())
        # A buffer in transformers, filled by hand if at all: part of the file, no part of the training.
        logits = logits + lax.stop_gradient(self.final_logits_bias)
        return Seq2SeqLMOutput(logits=logits, **_rest(out))


class MvpForSequenceClassification(_Tunable, tasks.Task):
    """MVP that classifies a sequence by the decoder's state at its last end token."""

    task: ClassVar[str] = "sequence_classification"
    trunk_class = MvpModel

    def setup(self) -> None:
        super().setup()
        c = self.config
        init = nn.initializers.normal(c.init_std)
        self.classifier = heads.ClassificationHead(
            c.d_model, c.num_labels, c.classifier_dropout, init, self.dtype, self.param_dtype
        )

    def __call__(
        self, input_ids: jax.Array | None = None, deterministic: bool = True, **inputs: Any
    ) -> Seq2SeqSequenceClassifierOutput:
        """Runs trunk and head; `inputs` are the trunk's.

        Every row of input_ids holds as many end tokens as the others, at least one. Where they are traced (under jit)
        and it does not, all logits are NaN.

        Raises:
            ValueError: that is seen not to hold; there are no input_ids, or another number of decoder inputs.
        """
        if input_ids is None:
            raise ValueError(
                "the classifier looks for the end token in input_ids: pass them, not inputs_embeds"
            )
        out = self.trunk(input_ids, deterministic=deterministic, **inputs)
        states_BTD = out.last_hidden_state
        if states_BTD.shape[:2] != input_ids.shape:
            raise ValueError(
                f"the decoder's input has shape {states_BTD.shape[:2]}, where the classifier needs that of input_ids, "
                f"{input_ids.shape}: it reads the decoder at their last end token"
            )
        last_B, found = jnp.zeros_like(input_ids[:, 0]), jnp.array(True)
        if not self.is_initializing():  # whose ids are no text
            last_B, found = last_end_token(input_ids, self.config.eos_token_id)
        state_BD = jnp.take_along_axis(states_BTD, last_B[:, None, None], axis=1)[:, 0]
        logits = jnp.where(found, self.classifier(state_BD, deterministic), jnp.nan)
        return Seq2SeqSequenceClassifierOutput(logits=logits, **_rest(out))


class MvpForQuestionAnswering(_Tunable, tasks.Task):
    """MVP that marks an answer in its decoder's text."""

    task: ClassVar[str] = "question_answering"
    trunk_class = MvpModel

    def setup(self) -> None:
        super().setup()
        self.qa_outputs = heads.classifier(self, 2)

    def __call__(self, input_ids: jax.Array | None = None, **inputs: Any) -> Seq2SeqQuestionAnsweringOutput:
        """Runs trunk and head; `inputs` are the trunk's."""
        out = self.trunk(input_ids, **inputs)
        start, end = heads.span_logits(self.qa_outputs(out.last_hidden_state))
        return Seq2SeqQuestionAnsweringOutput(start_logits=start, end_logits=end, **_rest(out))


class MvpForCausalLM(_Tunable, tasks.CausalLM):
    """MVP's decoder alone, with a language-modelling head; labels stand at the logits that predict them."""

    task: ClassVar[str] = "unshifted_lm"
    trunk_class = MvpDecoderModel


__all__ = [
    "MvpModel",
    "MvpForConditionalGeneration",
    "MvpForSequenceClassification",
    "MvpForQuestionAnswering",
    "MvpForCausalLM",
]

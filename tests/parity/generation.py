"""What the comparisons of generation share: pairs of equal models, batches, and transformers' group beam search.

4.57.6 has moved that search's loop out of the library and kept the scorer that decides in it; the loop here calls that.
"""

import functools
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from transformers.generation.beam_search import BeamSearchScorer
from transformers.generation.logits_process import HammingDiversityLogitsProcessor

import inference
import modelzoo
from inference import GenerationConfig

VOCAB, PAD, EOS = 97, 0, 2
FAMILIES = ("gptj", "bloom", "mvp")
_SHARED: dict[str, Any] = dict(vocab_size=VOCAB, attn_implementation="eager")
_CONFIGS: dict[str, tuple[Any, str, list[dict[str, Any]]]] = {
    "gptj": (
        transformers.GPTJConfig,
        "GPTJForCausalLM",
        [
            dict(n_embd=48, n_layer=3, n_head=4, rotary_dim=8, n_positions=96, n_inner=80),
            dict(n_embd=24, n_layer=2, n_head=3, rotary_dim=4, n_positions=128, n_inner=31),
            dict(n_embd=40, n_layer=1, n_head=5, rotary_dim=8, n_positions=64),
            dict(n_embd=32, n_layer=2, n_head=2, rotary_dim=16, n_positions=80, activation_function="relu"),
            dict(n_embd=20, n_layer=4, n_head=1, rotary_dim=2, n_positions=96, layer_norm_epsilon=0.1),
        ],
    ),
    "bloom": (
        transformers.BloomConfig,
        "BloomForCausalLM",
        [
            dict(hidden_size=48, n_layer=2, n_head=4),
            dict(hidden_size=50, n_layer=3, n_head=5, apply_residual_connection_post_layernorm=True),
            dict(hidden_size=24, n_layer=1, n_head=1),
            dict(hidden_size=44, n_layer=2, n_head=11),
            dict(hidden_size=32, n_layer=2, n_head=8, tie_word_embeddings=False),
        ],
    ),
    "mvp": (
        transformers.MvpConfig,
        "MvpForConditionalGeneration",
        [
            _mvp := dict(
                d_model=48,
                max_position_embeddings=96,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=80,
                decoder_layers=3,
                decoder_attention_heads=3,
                decoder_ffn_dim=60,
            ),
            _mvp | dict(use_prompt=True, prompt_length=5, prompt_mid_dim=7),
            _mvp | dict(scale_embedding=True, tie_word_embeddings=False),
            _mvp | dict(d_model=24, encoder_layers=1, decoder_layers=1, activation_function="relu"),
            _mvp | dict(decoder_start_token_id=5, max_position_embeddings=64),
        ],
    ),
    "mvp-decoder": (
        transformers.MvpConfig,
        "MvpForCausalLM",
        # transformers makes a cache of as many layers as the encoder would have.
        [_mvp | dict(encoder_layers=3), _mvp | dict(encoder_layers=3, scale_embedding=True)],
    ),
}


@functools.cache
def pair(family: str, number: int = 0) -> tuple[Any, modelzoo.Model, Any]:
    """(torch model, our model, our parameters) of a family's configuration, with logits at unit scale."""
    torch.manual_seed(number)
    config_class, model_name, configs = _CONFIGS[family]
    config = config_class(**_SHARED, bos_token_id=1, eos_token_id=EOS, **configs[number])
    theirs = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, params = modelzoo.from_hf(folder)
    return theirs, ours, inference.prepare(ours, params)


@functools.cache
def batch(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Four prompts of different lengths, padded where the family pads, with an end token in an encoder's."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (4, 11))
    mask = np.ones_like(ids)
    for row, padding in enumerate((0, 4, 8, 1)):
        here = slice(11 - padding, 11) if family == "mvp" else slice(0, padding)
        mask[row, here], ids[row, here] = 0, PAD
    return ids, mask


def both(
    family: str, number: int = 0, rows: int = 4, begun: np.ndarray | None = None, **fields: Any
) -> tuple[Any, Any]:
    """(our output, theirs) for one config; pad_token_id, scores and no end token unless `fields` say otherwise.

    `begun` is what an encoder-decoder's output begins with.
    """
    theirs, ours, params = pair(family, number)
    ids, mask = (array[:rows] for array in batch(family))
    fields = {"pad_token_id": PAD, "eos_token_id": None} | fields
    given: dict[str, Any] = (
        {"custom_generate": group_beam_search} if fields.get("num_beam_groups", 1) > 1 else {}
    )
    if begun is not None:
        given["decoder_input_ids"] = torch.tensor(begun)
    tokenizer, wanted = fields.pop("tokenizer", None), dict(fields)
    if tokenizer is not None:
        # 4.57.6 hands a tokenizer on to the model, which most refuse; so its criterion is made here.
        stop = transformers.StopStringCriteria(tokenizer, wanted.pop("stop_strings"))
        given["stopping_criteria"] = transformers.StoppingCriteriaList([stop])
    with torch.no_grad():
        want = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            return_dict_in_generate=True,
            output_scores=True,
            **given,
            **wanted,
        )
    config = GenerationConfig(**fields, output_scores=True)
    out = inference.generate(ours, params, ids, mask, config, tokenizer=tokenizer, decoder_input_ids=begun)
    return out, want


def assert_same(out: Any, want: Any, scores: bool = True) -> None:
    """Equal tokens, and scores to the contract's tolerance."""
    np.testing.assert_array_equal(out.sequences, want.sequences.numpy())
    if getattr(want, "sequences_scores", None) is not None:
        np.testing.assert_allclose(out.sequences_scores, want.sequences_scores.numpy(), atol=2e-5, rtol=1e-5)
    if scores and want.scores is not None:
        theirs = np.stack([step.numpy() for step in want.scores])
        assert out.scores.shape == theirs.shape
        np.testing.assert_array_equal(np.isneginf(out.scores), np.isneginf(theirs))
        finite = np.isfinite(theirs)
        np.testing.assert_allclose(out.scores[finite], theirs[finite], atol=2e-5, rtol=2e-6)


def group_beam_search(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **inputs: Any,
) -> Any:
    """Diverse beam search over BeamSearchScorer, for `generate(custom_generate=...)`."""
    c = generation_config
    eos, pad, groups = c._eos_token_tensor, c._pad_token_tensor, c.num_beam_groups
    rows, start = input_ids.shape
    num_beams, size = c.num_beams, c.num_beams // groups
    scorer = BeamSearchScorer(
        batch_size=rows // num_beams,
        num_beams=num_beams,
        device=input_ids.device,
        length_penalty=c.length_penalty,
        do_early_stopping=c.early_stopping,
        num_beam_hyps_to_keep=c.num_return_sequences,
        num_beam_groups=groups,
        max_length=c.max_length,
    )
    diverse = HammingDiversityLogitsProcessor(float(c.diversity_penalty), num_beams, groups)
    scores = torch.full((rows // num_beams, num_beams), -1e9)
    scores[:, ::size] = 0
    scores = scores.view(-1)
    inputs = model._get_initial_cache_position(start, input_ids.device, inputs)
    while True:
        out = model(**model.prepare_inputs_for_generation(input_ids, **inputs), return_dict=True)
        log_probs = torch.log_softmax(out.logits[:, -1].float(), dim=-1)
        current = torch.zeros(rows, dtype=torch.long)
        origin = torch.zeros(rows, dtype=torch.long)
        for group in range(groups):
            prompts = torch.arange(rows // num_beams)[:, None] * num_beams
            members = (prompts + group * size + torch.arange(size)).view(-1)
            text = input_ids[members]
            processed = diverse(text, log_probs[members], current_tokens=current, beam_group_idx=group)
            processed = logits_processor(text, processed) + scores[members, None]
            vocab = processed.shape[-1]
            num_ends = 0 if eos is None else len(eos)
            top, places = torch.topk(processed.view(-1, size * vocab), max(2, 1 + num_ends) * size)
            chosen = scorer.process(
                text,
                top,
                places % vocab,
                torch.div(places, vocab, rounding_mode="floor"),
                pad_token_id=pad,
                eos_token_id=eos,
                group_index=group,
                decoder_prompt_len=start,
            )
            scores[members] = chosen["next_beam_scores"]
            beams = chosen["next_beam_indices"]
            input_ids[members] = text[beams]
            current[members] = chosen["next_beam_tokens"]
            origin[members] = (
                num_beams * torch.div(beams, size, rounding_mode="floor") + group * size + beams % size
            )
        input_ids = torch.cat([input_ids, current[:, None]], dim=-1)
        inputs = model._update_model_kwargs_for_generation(
            out, inputs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        inputs["past_key_values"].reorder_cache(origin)
        if scorer.is_done or bool(stopping_criteria(input_ids, None).all()):
            break
    done = scorer.finalize(
        input_ids,
        scores,
        None,
        None,
        max_length=c.max_length,
        pad_token_id=pad,
        eos_token_id=eos,
        decoder_prompt_len=start,
    )
    return transformers.generation.GenerateBeamDecoderOnlyOutput(
        sequences=done["sequences"], sequences_scores=done["sequence_scores"]
    )

"""What the comparisons of generation share: pairs of equal models, batches, and transformers' group beam search.

Which classes generate, the registry says, and their configs are those of their family's cases (tests/parity/cases.py).
4.57.6 has moved that search's loop out of the library and kept the scorer that decides in it; the loop here calls that.
"""

import functools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.beam_search import BeamSearchScorer
from transformers.generation.logits_process import HammingDiversityLogitsProcessor

import inference
import modelzoo
from inference import GenerationConfig
from inference.decode import WRITING
from tests.parity import cases
from tests.parity.pairs import make_pair

VOCAB, PAD, EOS, LONGEST = 97, 0, 2, 64
WRITERS = [cls for cls in map(modelzoo.get_model_class, cases.CLASSES) if cls.task in WRITING]
"""Every class of the zoo that generates."""


KINDS = {(cls.task, "position_ids" in modelzoo.input_names(cls)): cls.__name__ for cls in reversed(WRITERS)}
"""One for each way to generate: the first class of a task that takes position_ids, and the first that does not."""


def titles(cls: type[modelzoo.Model]) -> list[str]:
    """The configs that a class generates with: those of its cases, of an encoder where it is made a decoder."""
    found, every = cases.titles(cls.__name__), cases.cases_of(cls.__name__).configs
    if cls.task != "causal_lm":
        return found
    default = getattr(cases.CLASSES[cls.__name__].config_class(), "is_decoder", True)
    return [title for title in found if every[title].get("is_decoder", default)]


def every_writer() -> Any:
    """Parametrises a test by `name`."""
    return pytest.mark.parametrize("name", [cls.__name__ for cls in WRITERS])


def every_kind() -> Any:
    """Parametrises a test by `name`, of those of `KINDS`: for what depends on no architecture."""
    return pytest.mark.parametrize("name", sorted(KINDS.values()))


@functools.cache
def pair(name: str, title: str | None = None) -> tuple[Any, modelzoo.Model, Any]:
    """(torch model, our model, our parameters) of a class, with logits at unit scale.

    Args:
        name: the class.
        title: of the config; None is the first that it generates with.
    """
    fields = dict(
        cases.cases_of(name).configs[title or titles(modelzoo.get_model_class(name))[0]], vocab_size=VOCAB
    )
    places = "max_position_embeddings"  # or what the family calls it, where it counts any
    if hasattr(getattr(transformers, name).config_class(), places):
        fields[places] = LONGEST
    theirs, ours, params = make_pair(name, fields, scale=0.15)
    return theirs, ours, inference.prepare(ours, params)


@functools.cache
def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Four prompts of different lengths, padded where the class pads: on the right what an encoder reads."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (4, 11))
    mask = np.ones_like(ids)
    on_the_right = pair(name)[0].config.is_encoder_decoder
    for row, padding in enumerate((0, 4, 8, 1)):
        here = slice(11 - padding, 11) if on_the_right else slice(0, padding)
        mask[row, here], ids[row, here] = 0, PAD
    return ids, mask


def both(
    name: str, title: str | None = None, rows: int = 4, begun: np.ndarray | None = None, **fields: Any
) -> tuple[Any, Any]:
    """(our output, theirs) for one config; pad_token_id, scores and no end token unless `fields` say otherwise.

    `begun` is what an encoder-decoder's output begins with.
    """
    theirs, ours, params = pair(name, title)
    ids, mask = (array[:rows] for array in batch(name))
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

"""lm-evaluation-harness over our model and over its own backend for transformers, on local tasks: the same numbers.

`make parity` installs it; skipped where it is not there (`pip install 'flaxtron[eval]' accelerate`).
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.small_tokenizers import SENTENCES, byte_level, save

pytest.importorskip("accelerate", reason="the harness's own backend needs it")
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[answer]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["o", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
WORDS = " ".join(SENTENCES).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small GPT-J with its tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = byte_level()
    save(tokenizer, folder, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=tokenizer.get_vocab_size(), n_embd=48, n_layer=2, n_head=4, rotary_dim=8, n_positions=48
    )
    config.bos_token_id = config.eos_token_id = 0
    model = transformers.GPTJForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Four tasks with their data in a folder; some texts are longer than the model's window."""
    folder, draw = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)

    def words(count):
        return " ".join(draw.choice(WORDS, count))

    rows = []
    for number in range(10):
        choices = [words(draw.integers(1, 4)) for _ in range(3)]
        question = words(2 + 3 * number) + (" " if number % 3 == 0 else "")
        rows.append(dict(question=question, choices=choices, answer=number % 3, text=words(4 + 6 * number)))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: '{folder}/data.jsonl'}}}}\n"
        (folder / f"{name}.yaml").write_text(head + files + text)
    return folder


@pytest.fixture(scope="module")
def results(folder, tasks):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from inference.harness import HarnessModel

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    ours = HarnessModel.load(str(folder), batch_size=4)
    assert ours.max_length == theirs.max_length == 48
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options: dict[str, Any] = dict(
        tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    return [lm_eval.simple_evaluate(model=model, **options) for model in (ours, theirs)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("ignore")
def test_numbers_are_those_of_the_harness(results, task):
    ours, theirs = (found["results"][task] for found in results)
    assert ours.keys() == theirs.keys()
    numbers = {name for name, value in theirs.items() if isinstance(value, float)}
    assert numbers
    for name in numbers:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_the_same(results, task):
    ours, theirs = (found["samples"][task] for found in results)
    assert len(ours) == len(theirs) == 10
    for one, other in zip(ours, theirs, strict=True):
        for mine, its in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            if isinstance(its, str):
                assert mine == its
            else:
                np.testing.assert_allclose(
                    np.asarray(mine, float), np.asarray(its, float), rtol=2e-5, atol=2e-5
                )
    assert len({repr(one["filtered_resps"]) for one in theirs}) > 5

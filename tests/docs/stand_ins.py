"""Small things under the names that pages use: checkpoints, texts, runs, files of other frameworks."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.docs.blocks import ROOT
from tests.docs.shortened import COMPILING, STEPS

VOCAB = 50400  # pages write GPT-2's ids


def make(folder: Path) -> None:
    """Makes all of them in a folder: texts first, which the rest is made of."""
    _texts(folder / "my/texts")
    runs = [_start_run(folder, "runs/quickstart", 2), _start_run(folder, "runs/mine", 4)]
    for makes in (_checkpoints, _heads, _other_frameworks, _files):
        makes(folder)
    for run in runs:
        if run.wait():
            raise RuntimeError("a stand-in for a run failed")
    _list(folder)  # now that the runs have made their folders


def names(folder: Path) -> list[str]:
    """Their names, as pages write them."""
    return (folder / "names").read_text().split()


def _texts(folder: Path) -> None:
    """A megabyte of Python's own sources, and a little prose."""
    folder.mkdir(parents=True)
    library = Path(os.__file__).parent
    for name in (
        "argparse",
        "ast",
        "calendar",
        "datetime",
        "difflib",
        "inspect",
        "pathlib",
        "tarfile",
        "typing",
        "zipfile",
    ):
        if (library / f"{name}.py").is_file():
            shutil.copy(library / f"{name}.py", folder)
    (folder / "prose.txt").write_text((ROOT / "docs/training.md").read_text())


def _start_run(folder: Path, name: str, steps: int) -> subprocess.Popen[bytes]:
    settings = STEPS | {"train.num_steps": steps, "train.workdir": repr(name), "data.path": "'my/texts'"}
    command = [sys.executable, "-m", "train", f"--gin_file={ROOT}/configs/quickstart.gin"]
    command += [f"--gin_param={key}={value}" for key, value in settings.items()]
    environment = dict(os.environ, XDG_CACHE_HOME=str(folder / "cache"), XLA_FLAGS=COMPILING)
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def _checkpoint(
    folder: Path, kind: str, preset: str, tokenizer: Any, purposes: dict[str, Any], **fields: Any
) -> None:
    import jax

    import modelzoo
    from tests import small_tokenizers

    model = modelzoo.get_model_class(kind)(modelzoo.get_config(preset, **fields))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) * 0.05, modelzoo.abstract_params(model)
    )
    modelzoo.to_hf(model, params, folder)
    small_tokenizers.save(tokenizer, folder, **purposes)


def _checkpoints(folder: Path) -> None:
    from tests import small_tokenizers as small

    words, style = small.byte_level(), {"eos_token": "<|endoftext|>"}
    for kind, preset, length, places in (
        (
            "GPTJForCausalLM",
            "tiny-gptj",
            "n_positions",
            ["path/to/gpt-j", "path/to/gpt-j-6b", "EleutherAI/gpt-j-6b"],
        ),
        (
            "BloomForCausalLM",
            "tiny-bloom",
            "",
            ["path/to/bloom", "path/to/bloom-560m", "bigscience/bloom-560m", "bigscience/bloom"],
        ),
        (
            "MvpForConditionalGeneration",
            "tiny-mvp",
            "max_position_embeddings",
            ["path/to/mvp", "RUCAIBox/mvp"],
        ),
    ):
        fields: dict[str, Any] = {"vocab_size": VOCAB}
        fields |= {length: 512} if length else {}
        fields |= {} if "mvp" in preset else {"n_head": 8}  # which eight devices divide
        first, *others = places
        roberta = preset == "tiny-mvp"
        tokenizer, purposes = (small.roberta(), small.ROBERTA_PURPOSES) if roberta else (words, style)
        _checkpoint(folder / first, kind, preset, tokenizer, purposes, **fields)
        for other in others:
            shutil.copytree(folder / first, folder / other)


def _heads(folder: Path) -> None:
    from tests import small_tokenizers as small

    fields: dict[str, Any] = dict(vocab_size=small.roberta().get_vocab_size(), max_position_embeddings=514)
    for name, head in {
        "roberta-base": "MaskedLM",
        "runs/reviews": "SequenceClassification",
        "runs/squad": "QuestionAnswering",
        "runs/names": "TokenClassification",
        "runs/swag": "MultipleChoice",
    }.items():
        kind = f"RobertaFor{head}"
        _checkpoint(folder / name, kind, "tiny-roberta", small.roberta(), small.ROBERTA_PURPOSES, **fields)
    shutil.copytree(folder / "roberta-base", folder / "roberta-base-folder")


def _other_frameworks(folder: Path) -> None:
    from tests.gptj_names import CONFIG, gptj_arrays
    from tests.mesh_state import save_shards, shards_of
    from tests.torch_files import save_archive

    fixtures = ROOT / "tests/fixtures/convert"
    for name in ("megatron_bert_345m_v0.1_cased.zip", "megatron_bert_345m.zip"):
        with zipfile.ZipFile(folder / name, "w") as file:
            file.write(
                fixtures / "megatron-bert-1/model_optim_rng.pt", "release/mp_rank_00/model_optim_rng.pt"
            )
    shutil.copytree(fixtures / "megatron-lm", folder / "checkpoints/gpt2/iter_0000007")
    save_shards(folder / "step_383500", shards_of(gptj_arrays(), 11, 2))
    (folder / "tiny-gptj.json").write_text(json.dumps(CONFIG))
    save_archive(folder / "weights.bin", gptj_arrays())


def _files(folder: Path) -> None:
    from tests.gptj_names import CONFIG

    (folder / "config.json").write_text(json.dumps(CONFIG))
    reviews = [{"sentence": f"a film number {i}", "stars": i % 2} for i in range(40)]
    rows = "".join(f"{row['sentence']},{row['stars']}\n" for row in reviews)
    (folder / "reviews.csv").write_text("sentence,stars\n" + rows)
    (folder / "reviews.jsonl").write_text(
        "".join(json.dumps({"text": row["sentence"]}) + "\n" for row in reviews)
    )
    (folder / "book.txt").write_text("Ann wrote it in Oslo. " * 20)
    (folder / "held_out.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "story.txt").write_text("the quick brown fox")


def _list(folder: Path) -> None:
    made = [
        path.relative_to(folder).as_posix()
        for pattern in ("*", "*/*", "*/*/*")
        for path in folder.glob(pattern)
    ]
    (folder / "names").write_text("\n".join(name for name in sorted(made, key=len) if name != "names"))

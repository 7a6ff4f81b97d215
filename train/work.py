"""What a run works on: its batches, how well it does on what is held out, and what goes into its checkpoints.

`open_work` is all that the loop and its replay (`train.verify`) know of data, be it plain text or labelled examples.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import parallel
from parallel.cluster import process_zero_first
from train.experiment import Experiment
from train.objectives.corruption import LEFT_TO_RIGHT


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run works on.

    Attributes:
        batches: a source of batches: __next__, get_state, set_state.
        evaluate: params -> metrics on what is held out, such as {"loss": ..., "f1": ...}; empty where nothing is.
        measures: the names of these metrics.
        texts: files to lay beside the arrays of every checkpoint: name -> contents.
        fingerprint: names the data, hexadecimal: runs on the same agree on it.
        origin: the setting that the data is from, for messages.
        summary: a line about the data.
    """

    batches: Any
    evaluate: Callable[[Any], dict[str, float]]
    measures: Sequence[str]
    texts: Mapping[str, str]
    fingerprint: str
    origin: str
    summary: str


def open_work(experiment: Experiment, rules: parallel.Rules) -> Work:
    """Opens the data of an experiment.

    Args:
        experiment: what to train.
        rules: of its mesh.

    Raises:
        OSError, ValueError: the data cannot be read, or does not fit the model, or `train.keep_best` is of nothing that
            is measured on it.
    """
    from train.data.batches import batch_shard

    shard = batch_shard(parallel.batch_sharding(rules), experiment.run.global_batch_size)
    work = (_examples if experiment.task is not None else _text)(experiment, rules, shard)
    best = experiment.run.keep_best
    if best is not None and best not in work.measures:
        at = experiment.settings.where("train.keep_best")
        raise ValueError(
            f"train.keep_best = {best!r}{at}: what is measured is {', '.join(sorted(work.measures))}"
        )
    return work


def _text(experiment: Experiment, rules: parallel.Rules, shard: tuple[int, int]) -> Work:
    """Tokens on disk, then batches whose order follows from (seed, step) alone."""
    from train.data import batches as text
    from train.data.rampup import BatchSizes
    from train.data.tokens import prepare_tokens
    from train.objectives.rows import ObjectiveBatches, TextRows
    from train.step import make_eval_step

    run = experiment.run
    with process_zero_first("data"):
        tokens = prepare_tokens(**experiment.data, model_vocab_size=experiment.config.vocab_size)
    given, actual = experiment.config.eos_token_id, tokens.manifest["end_of_text_id"]
    model = experiment.model
    reads_both_ways = model.task not in (LEFT_TO_RIGHT, "unshifted_lm")
    if given != actual and not reads_both_ways:
        key = f"{experiment.family}.eos_token_id"
        raise ValueError(
            f"{key} = {given}{experiment.settings.where(key)}, but documents end with token {actual} "
            f"({tokens.manifest['end_of_text']}): set {key} = {actual}"
        )
    sizes: Any = dict(
        sequence_length=run.sequence_length, global_batch_size=run.global_batch_size, shard=shard
    )
    batches: Any = text.train_batches(tokens, seed=run.seed, rampup=run.batch_rampup, **sizes)
    texts = {"tokenizer.json": tokens.tokenizer_file.read_text()}
    rows = None
    if model.task != LEFT_TO_RIGHT:
        rows = TextRows(model, tokens, experiment.objective, run.sequence_length)
        batches = ObjectiveBatches(batches, rows, run.seed)
        texts["tokenizer_config.json"] = rows.tokenizer_config
    eval_step = make_eval_step(model, rules=rules)
    of_tokens = model.task not in ("pretraining", "next_sentence")  # whose loss is of sentences too

    def evaluate(params: Any) -> dict[str, float]:
        held_out = text.validation_batches(tokens, max_batches=run.eval_batches, **sizes)
        if rows is not None:
            mine = BatchSizes(run.global_batch_size).part(0, shard)
            held_out = rows.held_out(held_out, mine, run.global_batch_size, run.eval_batches)
        sums = [eval_step(params, batch) for batch in held_out]
        counted = sum(int(s["tokens"]) for s in sums)
        if not counted:
            return {}
        loss = sum(float(s["loss_sum"]) for s in sums) / counted
        return {"loss": loss} | ({"perplexity": math.exp(min(loss, 700.0))} if of_tokens else {})

    return Work(
        batches=batches,
        evaluate=evaluate,
        measures=("loss", "perplexity") if of_tokens else ("loss",),
        texts=texts,
        fingerprint=tokens.manifest["fingerprint"],
        origin=f"data.path = {tokens.manifest['path']!r}",
        summary=f"{tokens.manifest['documents']:,} documents, {tokens.manifest['train_tokens']:,} tokens to train on "
        f"and {tokens.manifest['validation_tokens']:,} held out, in {tokens.folder}",
    )


def _examples(experiment: Experiment, rules: parallel.Rules, shard: tuple[int, int]) -> Work:
    """Labelled examples, read whole: what a head learns from is small beside what a model is made from."""
    from train.tasks import scores
    from train.tasks.batches import RowBatches
    from train.tasks.evaluating import Evaluation, head_of
    from train.tasks.words import keep_words, open_words

    run, task = experiment.run, experiment.task
    assert task is not None
    head_class = head_of(experiment.model)
    scores.require(*head_class.libraries)
    train, held_out = experiment.examples
    setting, folder = "task.tokenizer", task.tokenizer
    if folder is None and experiment.start is not None:
        setting, folder = "train.init_from", str(experiment.start.folder)
    data = hashlib.sha256()
    for one in (*train, *held_out):
        data.update(repr(sorted(one.fields.items())).encode())
    with process_zero_first("tokenizer"):
        if folder is None:
            # Made once: a run that goes on reads the same, whatever tokenizers would make of the text by then.
            made = Path(run.workdir) / f"tokenizer-{experiment.config.vocab_size}-{data.hexdigest()[:8]}"
            folder = keep_words(made, experiment.config, (text for one in train for text in one.texts()))
        words = open_words(folder, experiment.config, setting)
    lengths = task.lengths(run.sequence_length)
    head = head_class(experiment.model, words, task, run.sequence_length)
    rows = head.rows(train)
    num_cut = head.num_cut
    evaluation = Evaluation(
        head,
        held_out,
        rules=rules,
        lengths=lengths,
        batch_size=run.global_batch_size,
        shard=shard,
        workdir=run.workdir,
    )
    data.update(words.files["tokenizer.json"].encode())
    pieces = f" in {len(rows):,} pieces" if len(rows) != len(train) else ""
    cut = f"; {num_cut:,} do not fit {run.sequence_length} tokens" if num_cut else ""
    return Work(
        batches=RowBatches(
            rows,
            head.batch,
            lengths=lengths,
            batch_size=run.global_batch_size,
            seed=run.seed,
            shard=shard,
            rampup=run.batch_rampup,
        ),
        evaluate=evaluation,
        measures=evaluation.measures,
        texts=words.files,
        fingerprint=data.hexdigest(),
        origin=f"task.train_file = {task.train_file!r}",
        summary=f"{len(train):,} examples to train on{pieces} and {len(held_out):,} held out{cut}",
    )


def check_same_data(experiment: Experiment, work: Work, saved: str) -> None:
    """Checks that a checkpoint was trained on this data.

    Args:
        experiment: what to train.
        work: what it works on.
        saved: the fingerprint that the checkpoint has.

    Raises:
        ValueError: it was not, and `train.allow_changes` is off.
    """
    if saved != work.fingerprint and not experiment.run.allow_changes:
        raise ValueError(
            f"{work.origin}: the text has changed since the checkpoint in {experiment.run.workdir} was written; bring "
            "the old text back, choose another train.workdir, "
            'or go on with the new one by --gin_param="train.allow_changes=True"'
        )


def check_agreement(start: int, work: Work) -> None:
    """Checks that all processes go on from one step and read the same data.

    Raises:
        ValueError: they do not.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    fingerprint = np.frombuffer(bytes.fromhex(work.fingerprint), np.uint32)
    found: Any = multihost_utils.process_allgather(np.array([start, *fingerprint.tolist()], np.uint32))
    setting = work.origin.partition(" ")[0]
    for process, (other, *data) in enumerate(found.tolist()):
        if other != found[0][0]:
            raise ValueError(
                f"train.workdir: process {process} finds step {other} there, process 0 step {found[0][0]}: give all "
                "processes one folder"
            )
        if data != found[0][1:].tolist():
            raise ValueError(
                f"{setting}: process {process} reads another text than process 0: give all the same files"
            )

"""From text on disk to batches: documents -> tokenizer -> shards -> shuffled rows.

    data = prepare_tokens("stdlib", vocab_size=4096)
    batches = train_batches(data, sequence_length=128, global_batch_size=16, seed=0)
    next(batches)["input_ids"]      # int32 [16, 128], a pure function of (seed, step)

sources -> units, building (`python -m train.data`) -> shards -> tokens (a folder found or made) -> packing, batches.
Only the last needs jax and grain.
"""

"""From text on disk to batches: documents -> tokenizer -> token files -> shuffled windows.

    data = prepare_tokens("stdlib", vocab_size=4096)
    batches = iter(train_batches(data.train, sequence_length=128, global_batch_size=16, seed=0))
    next(batches)["input_ids"]      # int32 [16, 128], a pure function of (seed, step)

The two come from `train.data.tokens` and `train.data.batches`: only the second needs jax and grain.
"""

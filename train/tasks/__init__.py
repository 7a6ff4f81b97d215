"""Fine-tuning of every head from labelled files: examples, what a model reads of them, and how well it does.

settings -> examples -> words (tokens) -> heads (rows and labels) -> batches -> evaluating (metrics, predictions)
"""

"""What plain text teaches models that read both ways: masked words, sentences that follow, text with gaps.

Every row is a pure function of (seed, step, row of the global batch), drawn by numpy.
"""

"""Layers that all five families share. Each file owns one idea; none knows an architecture."""

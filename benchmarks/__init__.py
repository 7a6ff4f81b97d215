"""Side by side with transformers (torch) on the same weights: ratios, and fractions of what the machine can do."""

"""flaxtron beside transformers on the same weights, in one run: ratios, never absolute times alone."""

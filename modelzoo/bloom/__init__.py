"""BLOOM (BigScience, 2022, arXiv:2211.05100): up to 176B parameters, ALiBi in place of positions, a tied head."""

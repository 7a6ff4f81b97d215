"""GPT-2 (Radford et al., 2019): norms before attention and MLP, learned positions, a tied head."""

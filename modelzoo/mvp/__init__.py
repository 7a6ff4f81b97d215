"""MVP (Tang et al., 2022): an encoder-decoder for text generation, with soft prompts in every layer."""

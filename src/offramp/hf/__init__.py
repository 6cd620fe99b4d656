"""Opens any Hugging Face causal LM by its own modules; the core's only user of transformers."""

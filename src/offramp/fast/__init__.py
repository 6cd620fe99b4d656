"""Runs Llama-like models on a CPU by kernels of our own; whatever it cannot run, it refuses."""

"""Routed LoRA: the public functions, their eager and Triton backends, and the kernels."""

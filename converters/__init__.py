"""Checkpoints of others (GPTQ, compressed-tensors, float Hugging Face folders) and our own, read and written."""

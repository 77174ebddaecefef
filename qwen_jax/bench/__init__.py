"""Measurements at the true dimensions of Qwen models, with random weights made on the device: no checkpoint needed."""

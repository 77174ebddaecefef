"""Making quantized checkpoints."""

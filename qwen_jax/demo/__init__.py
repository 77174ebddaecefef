"""The demo's model: SmolLM2-135M-Instruct out of a Python package, for machines that reach no model hub."""

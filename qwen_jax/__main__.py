"""`python -m qwen_jax` is the `qwen-jax` command."""

from .cli import main

main()

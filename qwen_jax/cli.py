"""The `qwen-jax` command: finds the subcommand's module in `commands`, runs it, and turns errors into one line."""

import importlib
import importlib.util
import os
import pathlib
import sys
from typing import Annotated

import typer

from . import __version__

# In the order of --help.
COMMANDS = ("demo", "chat", "generate", "convert", "quantize", "finetune", "merge", "eval", "info", "plan", "bench")

EXAMPLES = """
qwen-jax demo
qwen-jax chat ./Qwen2.5-7B-Instruct-GPTQ-Int4 --kv8
qwen-jax COMMAND --help
"""

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
PCI_DEVICES = pathlib.Path("/sys/bus/pci/devices")


def build(names=COMMANDS) -> typer.Typer:
    """The application with the named subcommands; only their modules are imported."""
    app = typer.Typer(
        name="qwen-jax",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog=_examples(EXAMPLES))(_options)
    for name in names:
        module = importlib.import_module(f"qwen_jax.commands.{name}")
        if isinstance(module.run, typer.Typer):  # subcommands of its own
            app.add_typer(module.run, name=name, epilog=_examples(module.EXAMPLES))
        else:
            app.command(name, epilog=_examples(module.EXAMPLES))(module.run)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line and exits: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in arguments if not word.startswith("-")), None)
    completing = "_QWEN_JAX_COMPLETE" in os.environ
    try:
        _pass_over_absent_tpu()
        app = build((command,) if command in COMMANDS and not completing else COMMANDS)
        app(arguments, prog_name="qwen-jax")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if "--debug" in arguments:
            raise
        print(f"qwen-jax: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _pass_over_absent_tpu() -> None:
    """Tells JAX not to look for a TPU where libtpu is installed, for compiling ahead of time, but there is none.

    Else it writes several errors to the terminal, and takes a second and 300 MB. Google's PCI devices are TPUs or
    network cards: with a card JAX looks all the same.
    """
    packages = {name: importlib.util.find_spec(name) is not None for name in ("libtpu", *CUDA_PLUGINS)}
    vendors = (path.read_text().strip() for path in PCI_DEVICES.glob("*/vendor"))
    if packages.pop("libtpu") and not any(packages.values()) and "0x1ae0" not in vendors:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qwen-jax {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Quantized Qwen in JAX: chat with, convert and inspect Int4 and Int8 models on GPU, TPU and CPU.

    Exit codes: 0, 1 after an error (one line on standard error), 2 for wrong usage, 130 after Ctrl-C.
    """


def _examples(lines: str) -> str:
    """The examples of a command, one a line, for the end of its --help."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(lines.strip().splitlines())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = isinstance(error, (ValueError, OSError, ArithmeticError))  # messages that we or the system wrote
    return text if expected and text else f"{type(error).__name__}: {text} (run again with --debug for the traceback)"

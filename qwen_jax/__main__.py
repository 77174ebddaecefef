"""What `qwen-jax` and `python -m qwen_jax` start: Ctrl-C is heard from the first import on, and never lost."""

import os
import signal
import sys
import threading

AGAIN = 0.05  # seconds until an interruption that was swallowed comes once more


def main() -> None:
    """Runs the command line of this process."""
    sys.unraisablehook = hear_again(sys.unraisablehook)
    try:
        from .cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


def hear_again(hook):
    """A `sys.unraisablehook` for Ctrl-C inside of a callback, such as JAX has in garbage collection.

    Python can but ignore exceptions there; the signal is sent to the process once more, a moment later.
    """

    def heard(unraisable) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            hook(unraisable)

    return heard


if __name__ == "__main__":
    main()

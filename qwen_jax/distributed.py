"""Several processes as one program: `jax.distributed` starts them; here they meet before each step, in bounded time.

A process that dies is noticed by JAX's own heartbeats. One that lives and is stuck is not, and a collective of devices
would wait for it for ever: so processes meet at a barrier of JAX's coordination service, which has a time-out, before
each prefill and each chunk of decoding, and a timer runs beside the step itself.
"""

import contextlib
import itertools
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
from jax._src.distributed import global_state  # its client has no public name
from jax.errors import JaxRuntimeError

TIMEOUT = 600  # seconds that a step may take, compiling included
HEARTBEAT = 100  # seconds of silence after which JAX takes a process for dead

_timeout = TIMEOUT
_meetings = itertools.count()


class LostProcessError(TimeoutError):
    """Another process of the program died, or did not come to the next step in time."""


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = TIMEOUT,
) -> None:
    """Joins the processes of this program; before anything else that uses a device.

    Args:
        coordinator: HOST:PORT of process 0. None, as the next two: JAX finds them out by itself on Slurm, GKE and Cloud
            TPU, under Open MPI, and from JAX_COORDINATOR_ADDRESS.
        num_processes: of the program.
        process_id: of this one.
        timeout: seconds after which a process that does not answer, or does not come to a step, is given up.

    Raises:
        ValueError: no cluster was found and arguments are missing.
    """
    global _timeout
    _timeout = timeout
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=min(timeout, HEARTBEAT),
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"distributed: {error} JAX detects Slurm, GKE (with jax[k8s]), Cloud TPU and Open MPI; elsewhere give "
            "--coordinator HOST:PORT, --num-processes and --process-id."
        ) from error


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Around a step that all processes run together; nothing where there is one process.

    Raises:
        LostProcessError: some do not come within the time-out (they are named), or one is lost during the step.
    """
    if jax.process_count() == 1:
        yield
        return
    meeting, client = next(_meetings), global_state.client
    if client is None:
        raise ValueError(f"{name}: {jax.process_count()} processes, but jax.distributed.initialize() was not called.")
    try:
        client.wait_at_barrier(f"qwen_jax {meeting}", _timeout * 1000)
    except JaxRuntimeError as error:
        raise LostProcessError(_missing(name, meeting, str(error))) from error
    timer = threading.Timer(_timeout, _give_up, [name, meeting])
    timer.daemon = True
    timer.start()
    try:
        yield
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise LostProcessError(
            f"{name} (step {meeting}): failed in process {jax.process_index()}, expected every process to finish it: "
            f"{str(error).splitlines()[0]}. See what the others printed."
        ) from error
    finally:
        timer.cancel()


def _missing(name: str, meeting: int, message: str) -> str:
    """One line of the coordination service's long one."""
    names = message.partition("timed out task names:")[2].partition("RPC")[0]
    lost = re.findall(r"(?:^|task:)(\d+)\s*$", names, re.MULTILINE) or re.findall(r"Task (\d+) heartbeat", message)
    who = f"process {', '.join(sorted(set(lost), key=int))}" if lost else "another process"
    if message.startswith("DEADLINE_EXCEEDED"):
        return (
            f"{name} (step {meeting}): {who} did not come within {_timeout} seconds, expected all "
            f"{jax.process_count()}. It is stuck or very slow: look at its output and its devices."
        )
    return f"{name} (step {meeting}): {who} is lost: {message.splitlines()[0]}"


def _give_up(name: str, meeting: int) -> None:
    """Ends this process, which waits for a collective that has no time-out of its own."""
    print(
        f"qwen-jax: process {jax.process_index()}: {name} (step {meeting}): not finished after {_timeout} seconds "
        "though all processes began it. One of them, or a link between devices, is stuck; or compiling takes longer: "
        "raise the time-out.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Around what a command does after `start`: process 0 alone prints, an error ends the process at once.

    At once, because the way out of JAX waits for the other processes once more.
    """
    index = jax.process_index()
    if index > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        print(f"qwen-jax: process {index}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(1)

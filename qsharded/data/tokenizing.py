"""A process that tokenizes a dataset, and forks others that help it: ``python -m qsharded.data.tokenizing``.

Not a command: :func:`fill_by_processes` starts it, gives it a pickled :class:`qsharded.data.fill.Fill`, and gets back
what went wrong. A rank cannot fork by itself, for it holds a GPU and has threads; this process has neither, and the
memory that the work takes goes with it.
"""

import os
import pickle
import signal
import subprocess
import sys

from qsharded.data.fill import Fill, Interrupted, leave_with


def fill_by_processes(fill: Fill) -> None:
    """Have ``fill`` run by processes of its own.

    Raises:
        ValueError, OSError: as ``Fill.run``.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", __name__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    with process:
        try:
            said, _ = process.communicate(pickle.dumps((os.getpid(), fill)))
        finally:
            process.kill()  # the processes that it forked see that, and leave
    if not said:
        raise Interrupted(
            f"the process that tokenizes {fill.name} ended with status {process.returncode}: where it said nothing "
            "above, it was killed, most likely since memory was short; the same command goes on from where it was"
        )
    error = pickle.loads(said)
    if error is not None:
        raise error


def main() -> None:
    parent, fill = pickle.load(sys.stdin.buffer)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and this process ends with it
    leave_with(parent)
    error: Exception | None = None
    try:
        fill.run()
    except (ValueError, OSError) as caught:
        kind = next(kind for kind in (Interrupted, ValueError, OSError) if isinstance(caught, kind))
        error = kind(str(caught))
    sys.stdout.buffer.write(pickle.dumps(error))


if __name__ == "__main__":
    main()

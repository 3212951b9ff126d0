"""The way into the commands: without the packages of the extra `cli` it says how to get them, and its version.

Importing the commands takes a second or two, in which Ctrl-C is no traceback of whatever import is under way.
"""

import os
import signal
import sys

from minirl import __version__

INTERRUPTED = 130  # exit code after Ctrl-C, as of a shell


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"minirl {__version__}")
        return
    handles = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else Ctrl-C is to be ignored, as by nohup
    if handles:
        signal.signal(signal.SIGINT, _leave)
    try:
        from minirl.lab.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("tyro", "rich", "matplotlib"):
            raise
        print(f"minirl: the commands need the package {error.name}: pip install 'minirl[cli]'", file=sys.stderr)
        sys.exit(2)
    try:
        if handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a command saves, and says how to go on
        run()
    except (KeyboardInterrupt, SystemExit) as end:  # also before and after the command's own `try`
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        if handles:
            signal.signal(signal.SIGINT, _leave)  # Ctrl-C again, while the process ends
        sys.exit(INTERRUPTED)


def _leave(signum, frame) -> None:
    """End at once: nothing has begun, or everything is over."""
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()

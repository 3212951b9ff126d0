"""The way into the commands: without the packages of the extra `cli` it says how to get them, and its version."""

import sys

from minirl import __version__


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"minirl {__version__}")
        return
    try:
        from minirl.lab.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("tyro", "rich", "matplotlib"):
            raise
        print(f"minirl: the commands need the package {error.name}: pip install 'minirl[cli]'", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()

"""``python -m vmprovision``: the command line."""

from vmprovision.cli import run

if __name__ == "__main__":
    run()

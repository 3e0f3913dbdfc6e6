"""``python -m vmprovision``: the command line."""

from vmprovision.cli.app import run

if __name__ == "__main__":
    run()

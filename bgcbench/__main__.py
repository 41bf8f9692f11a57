"""``python -m bgcbench``."""

from bgcbench.cli import run

if __name__ == "__main__":
    run()

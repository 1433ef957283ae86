"""``python -m beholder``: the command line, also under torchrun."""

from beholder.cli import main

if __name__ == "__main__":
    main()

"""Lets `python -m dipeo_llm` stand for `dipeo-llm`."""

import sys

from dipeo_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Make `python -m dipeo_llm` the same command as `dipeo-llm`."""

import sys

from dipeo_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""The command `dipeo-llm`."""

from dipeo_llm.cli.command import main
from dipeo_llm.cli.options import Exit

__all__ = ["Exit", "main"]

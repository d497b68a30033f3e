"""The command `dipeo-llm`."""

from dipeo_llm.cli.command import Exit, main

__all__ = ["Exit", "main"]

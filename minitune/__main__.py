"""`python -m minitune`."""

from minitune.cli import process

raise SystemExit(process())

"""`python -m minitune`."""

from minitune.cli import main

raise SystemExit(main())

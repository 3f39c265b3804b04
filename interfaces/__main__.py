"""`python -m attnres`: the `attnres` command."""

from attnres.cli import main

raise SystemExit(main())

"""``python -m ep2tp``."""

from ep2tp.cli import main

main()

"""``python -m nblib``."""

from nblib.cli import main

main()

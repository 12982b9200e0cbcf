"""`python -m pmblkd`: the command `pmblk`, whatever is first in PATH."""

from pmblkd.cli import main

main()

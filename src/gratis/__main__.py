"""`python -m gratis` is the command line."""

from gratis.cli import main

main()

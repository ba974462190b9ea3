"""`python -m tinychat`."""

from tinychat.cli.main import main

main()

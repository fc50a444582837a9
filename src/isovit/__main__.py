"""``python -m isovit`` is the command line."""

from isovit.cli import main

main()

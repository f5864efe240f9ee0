"""`python -m megahybrid` is the same as `megahybrid`."""

import sys

from megahybrid.cli import main

if __name__ == "__main__":  # not in the processes that it starts
    sys.exit(main())

"""`python -m megahybrid` is the same as `megahybrid`."""

import sys

from megahybrid.cli import main

sys.exit(main())

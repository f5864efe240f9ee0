"""What the tools share; the programs themselves have no suffix. The tests import `tools.workers`."""

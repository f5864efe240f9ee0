"""`megahybrid doctor`."""

"""The scaling law in numpy: fits, intervals and checks of them; knows nothing of runs."""

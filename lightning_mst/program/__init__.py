"""The pieces of the command line program: training, sweeps, and the comparison of settings."""

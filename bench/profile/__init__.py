"""Where the time and the memory of a training step go: `python -m bench.profile`."""

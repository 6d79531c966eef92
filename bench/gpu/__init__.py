"""Everything that needs a GPU, in one command: `python3 -m bench.gpu`."""

"""The network as graphs for other runtimes, and a runner that takes the network's place."""

"""Floor 1, where the ranks run: topology, placement, rendezvous, process groups."""

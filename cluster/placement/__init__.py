"""Where the stages go: what the nodes have, what the stages need, and whether they fit."""

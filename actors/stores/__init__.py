"""Files in object stores: addresses, patience, and a node's copy of what it needs of a checkpoint."""

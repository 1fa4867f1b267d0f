"""What ranks say to each other: rendezvous, stage groups, links between stages, one transport a device."""

"""How ranks exchange tensors: rendezvous, stage groups, links between stages, one transport for each device."""

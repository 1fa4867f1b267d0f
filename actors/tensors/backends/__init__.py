"""All that depends on the device: one folder a device, and the choice between them."""

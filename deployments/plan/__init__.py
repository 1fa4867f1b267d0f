"""`stagemesh plan`: what will go where, before anything starts."""

"""`stagemesh bench` and `stagemesh profile`: how fast a server or a gang is."""

"""What runs in the next step: lanes, KV blocks, waiting sequences, deadlines, and how long steps take."""

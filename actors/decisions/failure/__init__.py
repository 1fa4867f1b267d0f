"""What a failure means: who ended an epoch, how long silence may last, which request ends ranks."""

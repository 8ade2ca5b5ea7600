"""One Run: typed settings, one loop, checkpoints that are whole or absent, resuming bit for bit."""

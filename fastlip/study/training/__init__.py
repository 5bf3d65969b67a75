"""Training of networks, by one process or several."""

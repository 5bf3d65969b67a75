"""The run directory on disk: how its files are written, locked, recorded and read back."""

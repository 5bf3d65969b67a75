"""Models as they are found: run without a trace left on them, and the layers that they use."""

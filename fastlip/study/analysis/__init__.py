"""Statistics of the measurements, verdicts, and results.json."""

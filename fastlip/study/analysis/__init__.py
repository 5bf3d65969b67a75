"""From per-image results to estimates, verdicts and results.json."""

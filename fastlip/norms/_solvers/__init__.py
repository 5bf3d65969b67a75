"""From operators to intervals: exact norms, iterations, and the bounds that hold for them."""

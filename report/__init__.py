"""Says what a run costs and what came out of it: estimates, scores with their intervals, tables, and pictures."""

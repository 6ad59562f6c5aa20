"""Reports of a run: its cost estimate, scores with intervals, tables, and pictures."""

"""What a run tells: scores, tables, costs and pictures."""

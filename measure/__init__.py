"""What bench.py measures, and how: in turns, a fresh process for each variant."""

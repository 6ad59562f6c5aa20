"""Measures time, memory and error for bench.py, each variant in a fresh process and all of them in turns."""

"""Measures time, memory and error of variants in turns, each in a fresh process."""

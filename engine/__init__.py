"""Runs trained models on the CPU from their packed codes, a whole token in one C call."""

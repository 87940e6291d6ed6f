"""Attacks on a run, what they achieve, and what can be certified."""

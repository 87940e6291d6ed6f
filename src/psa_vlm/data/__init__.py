"""Samples, the files they come from, and the images they hold."""

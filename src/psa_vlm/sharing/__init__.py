"""Runs for others: their model card, export, the Hub, and the authors' own checkpoints."""

"""How good a method is, on records of its replies: scorers, the scorecard and the report."""

"""The embedded small world: everything can be tried without a model hub."""

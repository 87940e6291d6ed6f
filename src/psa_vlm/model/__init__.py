"""The method's own modules, and the way they attach to a vision-language model."""

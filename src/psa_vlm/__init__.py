"""PSA-VLM: a readable safety bottleneck for vision-language models."""

__version__ = "0.1.0.dev0"

"""Settings that every test shares: one thread per worker, no network, reproducible examples."""

from __future__ import annotations

import os

# Read by torch and Hugging Face at import, so they are set before any test module is.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("psa_vlm", deadline=None, derandomize=True)
settings.load_profile("psa_vlm")

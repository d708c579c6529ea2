"""Models and requests shared by the tests of evaluation."""

from __future__ import annotations

import os

# Read when `datasets` and `huggingface_hub` are imported: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

"""PriorityCut: image animation trained with occlusion-aware mixing, distributed on Ray."""

import os

# Ray reads these when it is first imported, so they are set before any of our modules does.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or every line is printed twice
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

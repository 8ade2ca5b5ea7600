"""Common test set-up: one thread, so that results and timings don't depend on the machine's load."""

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
settings.register_profile("torchmto", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("torchmto")

"""The devices of this machine, for tests that hold on each: nothing is collected for a GPU that is not there."""

from __future__ import annotations

import pytest
import torch

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]

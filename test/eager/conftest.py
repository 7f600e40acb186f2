import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_values():
    torch.manual_seed(0)

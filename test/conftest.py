import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, so that each needs one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Every test starts with no compiled code and the default options."""
    import convbn_inductor_pass

    torch._dynamo.reset()
    before = convbn_inductor_pass.get_options()
    yield
    assert convbn_inductor_pass.get_options() == before

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

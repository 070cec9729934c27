"""What several test files share."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    "One PyTorch thread while a module's tests run; as before afterwards."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rounded(found, told):
    "The same but for rounding, and for the few pixels that rounding gives to a neighbour?"
    found, told = (t.float().nan_to_num(posinf=0.) for t in (found, told))
    return ((found - told).abs() > 1e-5).float().mean() <= .001

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

"""One thread for all tests of a module that imports this: sums in one order, and no more of the machine than a core."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

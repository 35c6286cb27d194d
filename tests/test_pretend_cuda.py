"""The CUDA paths of all scripts on a pretended CUDA device (tests/pretend): what a GPU would refuse, and where the host would wait for it."""
import pytest

import pretend


@pytest.fixture(scope="module", autouse=True)
def needs_the_device():
    if pretend.why_not():
        pytest.skip(pretend.why_not())


# ---------------------------------------------------------------- the counter of bytes
def count_a_product():
    import torch
    from pretend import memory

    memory.without_numbers()
    weight = torch.zeros(2**15, 2**15, device="cuda", requires_grad=True)  # 4 GiB

    def forward_and_backward():
        x = torch.zeros(2**10, 2**15, device="cuda")  # 128 MiB, and so is the product
        (x @ weight).sum().backward()

    return memory.peak(forward_and_backward)


def test_peak_memory_is_that_of_the_tensors_alive_at_once():
    counted, _ = pretend.run(count_a_product)
    assert counted["before"] == 2**32
    # The weight, its gradient, x, and of the product's shape: its gradient, which is an expanded number.
    assert counted["peak"] - counted["before"] - 2**32 - 2**27 < 2**28

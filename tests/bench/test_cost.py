import pytest
import torch
import torch.nn.functional as F

from structlayers import Chain, KSLinear
from structlayers.bench.cost import count_flops, peak_memory


def test_peak_memory_counts_what_lives_at_once():
    x, w = torch.randn(512, 256), torch.randn(1024, 256)

    def call() -> torch.Tensor:
        hidden = F.linear(x, w)  # 2 MiB, alive to the end of the next line
        hidden = hidden.relu()  # 2 MiB
        return hidden.sum(1)  # 2 KiB, beside the last 2 MiB

    with torch.inference_mode():
        peak, source = peak_memory(call, torch.device("cpu"))
    assert 4 * 2**20 <= peak <= 4.1 * 2**20
    assert "CPU" in source


def test_flops_of_a_chain_are_its_own_formula():
    chain = Chain.monarch(64, 96, blocks=4)
    layer, x = KSLinear(chain), torch.randn(2, 5, 64)
    assert count_flops(lambda: layer(x)) == chain.flops(10)


def test_flops_of_attention_are_counted_on_cpu():
    q = torch.randn(2, 4, 32, 16)
    scores_and_sums = 2 * 2 * 2 * 4 * 32 * 32 * 16
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == scores_and_sums


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda():
    x = torch.randn(1024, 1024, device="cuda")
    peak, source = peak_memory(lambda: x.relu().sum(), x.device)
    assert 4 * 2**20 <= peak <= 5 * 2**20
    assert source == "torch.cuda.max_memory_allocated"

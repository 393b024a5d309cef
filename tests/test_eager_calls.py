"""The short way that eager calls take past the dispatcher: the same results, and nobody who watches is left out."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from structlayers import ks_chain, ks_linear, ops, prepared
from structlayers.errors import ShapeError
from structlayers.problem import ACTIVATIONS, rounds_to_tf32

OPERATOR = torch.ops.structlayers.ks_linear


def tensors(dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 24), (1, 4, 5, 6), (20,))
    return [torch.randn(*s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["batch_first", "batch_last"])
def test_values_and_gradients_are_those_of_the_operator(layout, activation):
    x, w, bias = tensors()
    if layout == "batch_last":
        x = x.detach().movedim(-1, 0).requires_grad_()
    y = ks_linear(x, w, bias, layout=layout, activation=activation)
    same = OPERATOR(x, w, bias, None, None, layout, activation, "auto")
    assert torch.equal(y, same)
    assert type(y.grad_fn).__name__ == "_RecordedLinearBackward"
    dy = torch.randn(y.shape, dtype=y.dtype)
    pairs = [torch.autograd.grad(out, (x, w, bias), dy, create_graph=True) for out in (y, same)]
    for found, expected in zip(*pairs, strict=True):
        assert torch.equal(found, expected)
    seconds = [torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, w)) for grads in pairs]
    for found, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(found, expected)


def test_nothing_is_recorded_where_nothing_needs_it():
    x, w, bias = tensors()
    with torch.no_grad():
        assert ks_linear(x, w, bias).grad_fn is None
    with torch.inference_mode():
        assert ks_linear(x, w, bias).is_inference()
    assert ks_linear(x.detach(), w.detach()).grad_fn is None
    assert ks_linear(x.detach(), w.detach(), bias).requires_grad


def test_a_dispatch_mode_sees_the_operator():
    x, w, bias = tensors()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Recorder() as recorder:
            ks_linear(x, w, bias)
            ks_chain(x, [w.new_ones(4, 1, 2, 5), w])
        # With gradients a chain is its factors one after the other.
        assert recorder.names.count("structlayers.ks_linear.default") == (3 if grad else 1)
        assert recorder.names.count("structlayers.ks_chain.default") == (0 if grad else 1)
    with FlopCounterMode(display=False) as counter:
        ks_linear(x, w, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * w.numel()


def test_transforms_and_subclasses_see_the_operator(monkeypatch):
    x, w, bias = (tensor.detach() for tensor in tensors())
    monkeypatch.setattr(ops, "_ks_linear", None)

    class Subclass(torch.Tensor):
        pass

    assert ks_linear(x.as_subclass(Subclass), w, bias).shape == (3, 4, 20)
    assert ks_linear(x.to("meta"), w.to("meta"), bias.to("meta")).is_meta
    with pytest.raises(TypeError):
        ks_linear(x, w, bias)


def test_every_call_is_checked():
    """What an earlier call of other tensors prepared lets nothing else through."""
    x, w, bias = tensors(torch.float32)
    ks_linear(x, w, bias)
    wrong = (
        ("expected 24 features", (x[..., 1:], w, bias)),
        ("weight 1 has dtype torch.float64", (x, w.double(), bias)),
        ("bias has dtype torch.bfloat16", (x, w, bias.bfloat16())),
        ("bias of shape", (x, w, bias[1:])),
        ("weight 1 is on meta", (x, w.to("meta"), bias)),
    )
    for _ in range(2):
        for message, arguments in wrong:
            with pytest.raises(ShapeError, match=message):
                ks_linear(*arguments)


def test_what_was_prepared_is_found_again_and_does_not_pile_up(monkeypatch):
    made = []
    make = prepared._make_plan
    monkeypatch.setattr(prepared, "_make_plan", lambda *arguments: made.append(1) or make(*arguments))
    monkeypatch.setattr(prepared, "_plans", {})
    monkeypatch.setattr(prepared, "_MOST_PLANS", 5)
    _, w, bias = (tensor.detach() for tensor in tensors(torch.float32))
    for _ in range(3):
        ks_linear(torch.randn(7, 24), w, bias)
    assert len(made) == 1
    for n in range(20):
        ks_linear(torch.randn(n, 24), w, bias)
        assert len(prepared._plans) <= 5
    try:
        torch.set_float32_matmul_precision("high")
        before = len(made)
        ks_linear(torch.randn(19, 24), w, bias)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(made) == before + 1


def test_newer_precision_settings_of_torch_are_followed():
    # Where they are used, torch.get_float32_matmul_precision() raises.
    _, w, bias = (tensor.detach() for tensor in tensors(torch.float32))
    try:
        for value, rounds in (("tf32", True), ("ieee", False)):
            torch.backends.cuda.matmul.fp32_precision = value
            assert rounds_to_tf32() is rounds
            assert ks_linear(torch.randn(7, 24), w, bias).shape == (7, bias.numel())
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert ks_linear(torch.randn(7, 24), w, bias).shape == (7, bias.numel())
    finally:
        torch.set_float32_matmul_precision("highest")
    for value in ("high", "medium", "highest"):
        torch.set_float32_matmul_precision(value)
        assert rounds_to_tf32() is (value != "highest")

"""The first product of a process: on which device and of which type, once, and over when its context is."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from marks import on_gpu
from torch import nn

import tttc
from tttc.runtime import first_products as products
from tttc.runtime.first_products import first_products

GPU = torch.device("cuda", 0)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = GPU


def on(dtype):
    return torch.zeros(2, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def ran(monkeypatch):
    """What products were run, by this or another thread."""
    ran = []
    monkeypatch.setattr(products, "_begun", set())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    here = threading.current_thread()
    monkeypatch.setattr(
        products, "_product", lambda *what: ran.append((*what, threading.current_thread() is here))
    )
    return ran


def test_of_the_first_floating_tensor_on_a_gpu_and_once(ran):
    for _ in range(2):
        with first_products(
            [3, torch.zeros(2), on(torch.int64), on(torch.bfloat16), on(torch.half)]
        ):
            pass
        assert ran == [(GPU, torch.bfloat16, False)]
    with first_products([on(torch.half)]):
        pass
    assert ran[1:] == [(GPU, torch.half, False)]


def test_of_a_module_by_its_parameters(ran):
    class Module(nn.Module):
        def parameters(self):
            return [on(torch.float32)]

    with first_products([Module()]):
        pass
    assert ran == [(GPU, torch.float32, False)]


def test_of_the_type_that_autocast_takes(ran, monkeypatch):
    # torch.autocast stays off where there is no GPU.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with first_products([on(torch.float32)]):
        pass
    assert ran == [(GPU, torch.bfloat16, False)]


def test_is_over_when_its_context_is_whatever_happened_within(ran, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(products, "_product", lambda *what: (go.wait(), ran.append(what)))
    with pytest.raises(ZeroDivisionError), first_products([on(torch.half)]):
        assert not ran
        go.set()
        1 / 0  # noqa: B018
    assert len(ran) == 1


def test_nothing_while_a_graph_is_captured_or_without_a_gpu(ran, monkeypatch):
    with first_products([torch.zeros(2), nn.Linear(2, 2), SimpleNamespace(is_cuda=True)]):
        pass
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with first_products([on(torch.half)]):
        pass
    assert not ran and not products._begun


def test_who_has_no_parameters_to_tell_of_is_left_alone(ran):
    class Refuses(nn.Module):
        def parameters(self):
            raise RuntimeError("not yet")

    with first_products([Refuses()]):
        pass
    assert not ran


def test_a_type_without_products_is_left_to_the_model():
    products._product(torch.device("cpu"), torch.float8_e4m3fn)


@on_gpu
def test_a_model_that_is_compiled_begins_with_one(monkeypatch):
    monkeypatch.setattr(products, "_begun", set())
    monkeypatch.setenv("TTTC_WARM", "1")
    layer = tttc.nn.TTTLinear(64, num_heads=1).to("cuda", torch.bfloat16)
    with torch.no_grad():
        tttc.compile(layer, strict=True)(
            torch.randn(1, 64, 64, device="cuda", dtype=torch.bfloat16)
        )
    assert products._begun == {(GPU, torch.bfloat16)}

"""Quantised weights change what a model has learnt by no more than their bounds: int8 0.5 %, int4 3 % of perplexity."""

import argparse
import ast
import inspect
import sys
import tarfile
import typing

import pytest

from everlong.compare import drift, products
from everlong.compare.settings import Settings
from everlong.ops import native
from everlong.train.data import Corpus

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"no kernels: {native.MISSING}")
BOUNDS = {"int8": 0.005, "int4": 0.03}
SETTINGS = Settings(params=150_000, tokens=40_000, context=128, held_out=0.1)


@pytest.fixture(scope="module")
def text():
    return Corpus.from_paths(module.__file__ for module in (argparse, ast, inspect, tarfile, typing))


@pytest.mark.parametrize("name", ["attention", "mamba", "mamba2", "rwkv7", "griffin"])
@pytest.mark.float32("training in fp16 needs a scaled loss", only="float16")
def test_perplexity_of_trained_models(name, text):
    found = drift.perplexity_drift(name, SETTINGS, text, BOUNDS)
    assert float(found.base.split()[2]) < 5, "bits per byte: it has not learnt anything that could be lost"
    for format, bound in BOUNDS.items():
        assert abs(found.drift[format]) <= bound, f"{name} in {format}: {found.drift[format]:+.2%}"
        assert found.nbytes[format] < found.nbytes["fp32"]


def test_the_command_prints_tables(monkeypatch, capsys):
    monkeypatch.setitem(drift.preset.__globals__["PRESETS"], "tiny", lambda: drift.sized("mamba", 150_000))
    monkeypatch.setattr(sys, "argv", ["drift", "--presets", "tiny", "--mixers", "", "--formats", "bf16,int8"])
    drift.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | fp32 | bf16: error of logits, size | int8: error of logits, size |"
    assert lines[2].startswith("| tiny | 0 M | ") and lines[2].count("|") == 5


def test_products_are_measured(monkeypatch, capsys):
    for name, value in (("SHAPES", ((96, 64),)), ("BYTES", 1e5), ("SECONDS", 0.0)):
        monkeypatch.setattr(products, name, value)
    monkeypatch.setattr(sys, "argv", ["products", "--threads", "1"])
    products.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["torch fp32", "torch bf16", "fp32", "bf16", "int8", "int4"]
    assert all(float(cell) > 0 for line in lines[2:] for cell in line.strip("| ").split(" | ")[2:])

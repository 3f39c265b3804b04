"""Precision at risk: the numbers are what rounding does, and the words follow them."""

from __future__ import annotations

import math

import pytest
import torch

from attnres import precision
from attnres.scaled import SCALED_FP16, rounded


def test_precision_at_risk() -> None:
    normal = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    small, tiny, large = normal * 2.0**-18, normal * 2.0**-26, normal * 4000
    cases = torch.stack([normal, small, tiny, large, normal.bfloat16().float(), normal * 1e6, torch.zeros_like(normal)])
    found = precision.at_risk(cases)
    words = ("Fits fp16 (8", "Too small for fp16: ", "Too small for fp16: ", "Fits fp16, but its largest value is 1/")
    words = (*words, "Nothing is lost", "Overflows fp16: ", "Nothing is lost")
    assert all(risk.verdict.startswith(word) for risk, word in zip(found, words, strict=True)), found
    assert [risk.level for risk in found] == ["ok", "at risk", "at risk", "at risk", "ok", "at risk", "ok"]
    assert all(risk.bf16 == pytest.approx(1.66e-3, rel=0.03) for risk in (*found[:4], found[5]))
    assert all(risk.scaled_fp16 == pytest.approx(2.08e-4, rel=0.03) for risk in (*found[:4], found[5]))
    assert found[0].fp16 == pytest.approx(found[0].scaled_fp16, rel=1e-3)
    assert found[1].fp16 > found[1].bf16
    assert "more than bf16" in found[1].verdict
    for risk, case in zip(found, cases, strict=True):
        assert risk.largest == pytest.approx(float(case.abs().max()))
        assert risk.rms == pytest.approx(float(case.double().square().mean().sqrt()))
        assert risk.overflow == pytest.approx(float((case.abs() > 65504).float().mean()))
        assert risk.subnormal == pytest.approx(float(((case.abs() < 2.0**-14) & (case != 0)).float().mean()))
        assert risk.flushed == pytest.approx(float(((case.half() == 0) & (case != 0)).float().mean()))
    assert found[2].flushed > 0.3
    assert found[5].fp16 == math.inf


def test_scaled_fp16_is_exact_where_the_row_fits() -> None:
    rows = torch.tensor(
        [[2.0**20, 3.0, -7.0], [2.0**-60, 2.0**-70, 0.0], [0.0, 0.0, 0.0], [65504.0, 1.0, 2.0]]
    ).double()
    assert torch.equal(rounded(rows, SCALED_FP16), rows)
    assert not torch.equal(rows.half().double(), rows)

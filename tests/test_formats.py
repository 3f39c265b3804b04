"""The formats that the report runs: all that dtypes.TABLE lists, each row of the report judged as what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import attnres
from attnres import backend as backends
from attnres import cli, dtypes, formats, inputs, numerics, oracle, report, report_html, report_lines, report_output
from attnres.inputs import Shape
from attnres.scaled import SCALED_FP16, ScaledTensor

CPU = torch.device("cpu")
SMALL = Shape(3, 24, 3, 2)


@pytest.mark.parametrize("storage", dtypes.TABLE)
@pytest.mark.parametrize("column", dtypes.COLUMNS)
def test_every_row_and_column_is_visited(storage: str, column: str) -> None:
    mine = [found for found in formats.DTYPES.values() if found.sources == storage]
    assert {getattr(found, column) for found in mine} == set(getattr(dtypes.TABLE[storage], column))
    assert SCALED_FP16 in {found.storage for found in mine}
    assert any(found.stochastic for found in mine) == (storage != "float32")


def test_a_format_is_named_for_what_differs() -> None:
    assert all(found.name == name for name, found in formats.DTYPES.items())
    assert list(formats.DTYPES)[:5] == ["bf16", "fp16", "fp32", "bf16/fp32", "fp16_scaled"]
    found = formats.DTYPES["fp32+inter_out=fp16_scaled"]
    assert (found.sources, found.parameters, found.inter_out) == ("float32", "float32", SCALED_FP16)
    assert formats.DTYPES[SCALED_FP16].dtype == torch.bfloat16
    assert formats.read("phase2", found.name)
    assert not formats.read("phase1", found.name)


@pytest.mark.parametrize("op", inputs.OPS)
def test_cases_are_stored_as_they_say(op: str) -> None:
    for name, wanted in formats.DTYPES.items():
        given = inputs.make_case(op, SMALL, dtype=name).arguments
        sources = given.get("residuals", given.get("block_representations")) or [
            given.get("partial_sum", given.get("prefix"))
        ]
        for source in sources:
            assert isinstance(source, ScaledTensor) == (wanted.sources == SCALED_FP16)
            assert source.dtype == wanted.dtype
        for argument, column in (("delta", "delta"), ("inter_out", "inter_out")):
            if argument in given:
                kept = SCALED_FP16 if isinstance(given[argument], ScaledTensor) else str(given[argument].dtype)
                assert kept.removeprefix("torch.") == getattr(wanted, column)
        query = next(given[key] for key in ("query", "pseudo_queries", "pseudo_query", "qk_weight") if key in given)
        assert query.dtype == formats.torch_dtype(wanted.parameters)
        assert ("storage" in given) == (wanted.storage is not None and op in ("phase1", "phase2"))
        assert ("stochastic_seed" in given) == (wanted.stochastic and op != "mix")


@pytest.fixture(scope="module")
def found() -> report.Report:
    jobs = [
        report.Job(op, SMALL, "normal", name) for op in inputs.OPS for name in formats.DTYPES if formats.read(op, name)
    ]
    return report.run(jobs, ["torch"], CPU)


def test_every_format_is_within_budget(found: report.Report) -> None:
    assert [report_lines.describe(item) for item in found.broken] == []
    rows = {(row.op, row.dtype, row.tensor): row for row in found.rows}
    # the output's dtype sets the floor
    for name, low, high in (
        ("bf16", 1e-3, 3e-3),
        ("bf16+out=fp32", 1e-8, 1e-7),
        ("fp32+out=fp16", 1e-4, 4e-4),
        ("bf16+storage=fp16_scaled", 1e-4, 4e-4),
    ):
        floor = rows["phase1", name, "out"].floor
        assert floor is not None
        assert low < floor < high
    nearest, drawn = (rows["phase2", name, "new_partial"] for name in ("fp16_scaled", "fp16_scaled+stochastic"))
    assert nearest.error == 0
    assert drawn.error is not None
    assert 1e-4 < drawn.error < 5e-4
    of_step = rows["step", "bf16+stochastic", "prefix"].floor
    assert of_step is not None
    assert 1e-3 < of_step < 4e-3
    assert rows["step", "bf16", "prefix"].note == "in place, to the bit"


def test_every_form_of_the_report_has_the_table(found: report.Report, tmp_path: Path) -> None:
    table = report_lines.format_table(found.rows)
    assert list(table.lines) == list(formats.DTYPES)
    assert table.columns == [(op, "torch") for op in inputs.OPS]
    for name, cells in table.lines.items():
        assert [bool(text) for _, text in cells] == [formats.read(op, name) for op in inputs.OPS]
    assert table.lines["bf16"] == [("ok", "0.95/0.80")] * 3 + [("ok", "0.95")]
    assert '<th scope="row">bf16<wbr>+stochastic</th><td></td>' in report_html.to_html(found)
    assert "| fp32+delta=bf16 |  |  | 0." in report_output.to_markdown(found)
    with (tmp_path / "terminal").open("w") as file:
        report_output.to_terminal(found, Console(file=file, width=165))
    assert "fp16_scaled+inter_out=fp32" in (tmp_path / "terminal").read_text()


@pytest.mark.parametrize("op", inputs.OPS)
def test_explain_asks_what_the_call_asks(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[backends.Spec] = set()
    original = backends.refusal
    monkeypatch.setattr(backends, "refusal", lambda name, spec: asked.add(spec) or original(name, spec))
    for name in formats.DTYPES:
        if formats.read(op, name):
            case = inputs.make_case(op, SMALL, dtype=name)
            report.call(case, "torch")
            of_call = set(asked)
            asked.clear()
            attnres.explain(report.PUBLIC[op], **case.arguments)
            assert asked == of_call, name
            asked.clear()


def refusing(monkeypatch: pytest.MonkeyPatch, launch: str, feature: str) -> None:
    """torch says that it lacks a feature of a launch."""
    original = backends.refusal

    def refusal(name: str, spec: backends.Spec) -> str | None:
        if name == "torch" and spec.op == launch and feature in spec.features:
            return f"{launch} has no kernel yet for {feature}"
        return original(name, spec)

    monkeypatch.setattr(backends, "refusal", refusal)


def test_what_a_backend_refuses_has_its_reason_until_it_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [report.Job("phase1", SMALL, "normal", name) for name in ("bf16", "fp16_scaled")]
    with monkeypatch.context() as patch:
        refusing(patch, "phase1_fwd", "scaled fp16")
        made = report.run(jobs, ["torch", "triton"], CPU)
    assert made.ok
    assert report_lines.format_table(made.rows).lines["fp16_scaled"] == [("refused", "refused"), ("ok", "0.95/0.80")]
    ((backend, reason),) = report_lines.refusals(made.rows)
    assert backend == "torch"
    assert reason.endswith("phase1_fwd has no kernel yet for scaled fp16")
    for text in (report_html.to_html(made), report_output.to_markdown(made)):
        assert reason in text.replace("&#39;", "'")
    again = report.run(jobs, ["torch"], CPU)
    assert report_lines.format_table(again.rows).lines["fp16_scaled"] == [("ok", "0.95/0.80")]


def test_a_gradient_that_runs_elsewhere_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, "mix_bwd", "gradients of several dtypes")
    made = report.run([report.Job("mix", SMALL, "normal", "bf16+out=fp32")], ["torch"], CPU)
    assert made.ok
    assert {row.ran_on for row in made.rows if row.direction == "gradient"} == {"triton"}
    assert {row.ran_on for row in made.rows if row.direction == "forward"} == {""}
    (cell,) = report_lines.format_table(made.rows).lines["bf16+out=fp32"]
    assert cell[1].endswith("/triton")
    reason = "mix_bwd has no kernel yet for gradients of several dtypes; it runs on triton"
    assert report_lines.refusals(made.rows) == {("torch", reason): 1}
    assert "0.800, on triton" in report_html.to_html(made)


@pytest.mark.parametrize("op", ["phase1", "phase2", "step"])
def test_a_third_number_breaks_the_budget_of_stochastic_rounding(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = inputs.make_case(op, Shape(9, 40, 3, 2), dtype="bf16+stochastic")
    results = report.call(case, "torch")
    name = {"phase1": "out", "phase2": "new_partial", "step": "prefix"}[op]
    reference = oracle.reference(op, case.arguments, case.grad_outputs)[name]
    drawn = results[name]
    assert isinstance(drawn, torch.Tensor)
    assert reference.stochastic
    measured = numerics.judge_reference(drawn, reference)
    assert measured.ok
    assert measured.row_errors.p50 > 0
    nearest = reference.exact.to(drawn.dtype)
    assert 0.1 < (drawn != nearest).float().mean() < 0.5
    drawn.view(torch.int16).view(-1, 40)[4, 7] += 2
    assert not numerics.judge_reference(drawn, reference).ok

    def spoilt(case: inputs.Case, backend: str) -> Any:
        return {**results, name: drawn}

    monkeypatch.setattr(report, "call", spoilt)
    rows, _ = report.evaluate(case, ["torch"])
    assert name in {row.tensor for row in rows if row.verdict == "broken"}


def test_dtypes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "--backends", "torch", "--ops", "mix", "phase2", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--dtypes", "fp16_scaled/fp32,bf16+inter_out=fp32"]) == 0
    printed = capsys.readouterr().out
    assert "fp16_scaled/fp32" in printed
    assert "bf16+inter_out=fp32" in printed
    assert cli.main([*arguments, "--dtypes", "bf16+inter_out=fp16"]) == 2
    assert f"bf16+inter_out=fp16; allowed are {', '.join(formats.DTYPES)}" in capsys.readouterr().err


def test_formats_with_fp16_are_left_out_for_values_beyond_it() -> None:
    beyond = {name for name, found in formats.DTYPES.items() if found.plain_fp16}
    assert {"fp16", "fp16/fp32", "fp32+delta=fp16", "fp32+out=fp16", "fp16_scaled+inter_out=fp16"} <= beyond
    assert not {"bf16", "bf16/fp16", "fp16_scaled", "bf16+storage=fp16_scaled", "bf16+inter_out=fp16_scaled"} & beyond


@pytest.mark.gpu
@pytest.mark.parametrize("op", inputs.OPS)
@pytest.mark.parametrize(
    "name",
    [
        "bf16/fp16",
        "bf16+inter_out=fp16_scaled",
        "bf16+out=fp32",
        "bf16+storage=fp16_scaled",
        "bf16+stochastic",
        "fp16/fp32",
        "fp32+delta=bf16",
        "fp16_scaled",
        "fp16_scaled+delta=fp32",
        "fp16_scaled+storage=fp16_scaled",
        "fp16_scaled+stochastic",
    ],
)
def test_formats_on_the_gpu(op: str, name: str) -> None:
    """On every backend that takes it; CuTe as accurate as Triton."""
    if not formats.read(op, name):
        pytest.skip(f"{op} does not read what distinguishes {name}")
    case = inputs.make_case(op, Shape(67, 512, 3, 4), dtype=name, device="cuda")
    rows, pairs = report.evaluate(case, report.BACKENDS)
    assert [report_lines.describe(row) for row in rows if row.verdict == "broken"] == []
    assert [report_lines.describe(pair) for pair in pairs if pair.verdict == "worse"] == []
    assert {row.backend for row in rows if row.verdict == "ok"} >= {"torch", "triton"}

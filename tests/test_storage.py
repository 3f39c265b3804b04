"""The report's section on storage formats: what it measures, and that it judges."""

from __future__ import annotations

import pytest
import torch

from attnres import inputs, report, report_html, report_lines, report_output, storage
from attnres.scaled import SCALED_FP16
from attnres.storage import MERGE, OUT, SUM, StorageError

CPU = torch.device("cpu")


def measured() -> dict[tuple[str, str, str], StorageError]:
    found = storage.measure(inputs.captured_sources().sources, ["torch"], CPU)
    return {(error.result, error.blocks, error.storage): error for error in found}


def test_scaled_fp16_has_at_most_a_quarter_of_bf16s_error_at_any_magnitude() -> None:
    found = measured()
    for result in (OUT, MERGE):
        for blocks in ("activations", "activations up to 1e+30"):
            error = found[result, blocks, SCALED_FP16]
            assert error.verdict == "ok"
            assert 0.01 < error.ratio <= storage.BETTER
        assert found[result, "activations", "fp32"].ratio < 1e-3
    drift = {name: error.error for (result, _, name), error in found.items() if result == SUM}
    assert drift["bf16, stochastic"] < drift["bf16"] / 4
    assert drift[SCALED_FP16] < drift["bf16, stochastic"] / 4
    assert drift["fp32"] < 1e-6


def test_a_format_that_is_no_better_breaks_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BETTER", 1e-3)
    made = report.Report({"device": "CPU"}, storage=list(measured().values()))
    assert not made.ok
    assert {item.storage for item in made.broken} == {SCALED_FP16}
    assert "of bf16's" in report_lines.describe(made.broken[0])


def test_every_form_of_the_report_has_it() -> None:
    chosen = [job for job in report.jobs(("phase1",), ("bf16",), CPU) if job.kind == "captured"]
    made = report.run(chosen, ["torch"], CPU)
    assert made.ok
    assert made.storage
    page, markdown = report_html.to_html(made), report_output.to_markdown(made)
    assert 'id="storage-formats"' in page
    assert "storage-formats-" in page.split('id="storage-formats"')[1].split("</section>")[0]
    assert "| phase 1 | activations | fp16_scaled | torch |" in markdown

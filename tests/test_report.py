"""`attnres report` and `attnres info` in this process, on small cases; what they write, and each exit code."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import attnres.backend
from attnres import cli, inputs, oracle, report, report_lines, report_output, triton_interpreter
from attnres.backend import BackendError
from attnres.inputs import Shape
from attnres.numerics import judge_reference

triton_interpreter.use_without_gpu()
SMALL = (
    (Shape(3, 24, 3, 2), ("normal", "peaked"), ("bf16", "fp16", "fp32", "bf16/fp32")),
    (Shape(2, 384, 4, 2), ("captured",), ("bf16",)),
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dict.fromkeys(inputs.OPS, SMALL)
    monkeypatch.setattr(inputs, "CPU_PLAN", plan)
    monkeypatch.setattr(inputs, "GPU_PLAN", plan)


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report.json and report.md of `attnres report`."""
    code = cli.main(["report", "--out", str(out), *arguments])
    return code, json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, backend: str, output: str, factor: float) -> None:
    """Makes one output of one launcher wrong by a factor."""
    original = attnres.backend.launcher

    def spoiled(wanted: str, chosen: str) -> Any:
        launch = original(wanted, chosen)
        if (wanted, chosen) != (name, backend):
            return launch

        def wrong(*args: Any, **kwargs: Any) -> None:
            launch(*args, **kwargs)
            value = inspect.signature(launch).bind(*args, **kwargs).arguments[output]
            for each in value if isinstance(value, list) else [value]:
                each.mul_(factor)

        return wrong

    monkeypatch.setattr(attnres.backend, "launcher", spoiled)


def test_torch_and_triton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, markdown = run(tmp_path, "--backends", "torch,triton", "--dtypes", "bf16", "fp32")
    assert code == 0
    assert found["ok"] is True
    rows = found["rows"]
    assert {row["verdict"] for row in rows} == {"ok"}
    assert {row["backend"] for row in rows} == {"torch", "triton"}
    assert {row["dtype"] for row in rows} == {"bf16", "fp32"}
    assert {row["kind"] for row in rows} == {"normal", "peaked", "captured"}
    tensors = {op: {row["tensor"] for row in rows if row["op"] == op} for op in inputs.OPS}
    assert tensors == {
        "mix": {"out", "weights", "d_query", "d_residuals", "d_rms_weight", "d_output_rms_weight"},
        "phase1": {"out", "lse", "d_block_representations", "d_pseudo_queries", "d_rms_weight"},
        "phase2": {"out", "new_partial"}
        | {f"d_{name}" for name in ("partial_sum", "delta", "inter_out", "inter_lse", "pseudo_query")}
        | {"d_rms_weight", "d_output_rms_weight"},
        "step": {"out", "prefix", "blocks"},
    }
    for row in rows:
        assert row["direction"] == ("gradient" if row["tensor"].startswith("d_") else "forward")
        if (row["dtype"], row["tensor"], row["kind"]) == ("bf16", "out", "normal"):
            assert 5e-4 < row["floor"] < 3e-3
            assert row["error"] <= 1.05 * row["floor"]
    pairs = found["pairs"]
    assert {(pair["first"], pair["second"], pair["verdict"]) for pair in pairs} == {("torch", "triton", "")}
    assert len(pairs) == sum(row["backend"] == "torch" and row["tensor"] not in ("prefix", "blocks") for row in rows)
    assert all(0 <= pair["difference"] < 4e-3 for pair in pairs)
    assert len(found["metadata"]["kernel sources"]) == 64
    assert found["metadata"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert found["metadata"]["triton"].endswith("(interpreter)")
    assert "Every result is within its error budget." in markdown
    assert "| d_inter_lse | fp32 | T3 D24 N2 w norm add | peaked |" in markdown
    assert markdown.count("<details>") == 4
    terminal = capsys.readouterr().out
    assert f"{len(rows)} rows, {len(pairs)} comparisons, 0 kernels: all within budget" in terminal
    assert "Backend against backend" in terminal
    assert "Precision at risk" in terminal
    assert len(found["precision_at_risk"]) == 13
    for row in rows:
        if row["error"] is None:
            continue
        spread = row["row_errors"]
        assert list(spread) == ["p10", "p50", "p90", "p99", "max"]
        assert list(spread.values()) == sorted(spread.values())
        assert row["sources"] in (3, 4)
        if (row["dtype"], row["tensor"], row["kind"]) == ("bf16", "out", "normal"):
            assert 5e-4 < spread["p50"] < 3e-3
            assert spread["p50"] == pytest.approx(row["error"], rel=0.3)


@pytest.mark.parametrize(
    ("name", "output", "op", "tensor"),
    [
        ("mix_fwd", "out", "mix", "out"),
        ("mix_bwd", "d_query", "mix", "d_query"),
        ("mix_bwd", "d_sources", "mix", "d_residuals"),
        ("phase1_fwd", "lse", "phase1", "lse"),
        ("phase1_bwd", "d_queries", "phase1", "d_pseudo_queries"),
        ("phase2_fwd", "out", "phase2", "out"),
        ("phase2_bwd", "d_inter_lse", "phase2", "d_inter_lse"),
        ("serve_step", "prefix", "step", "prefix"),
        ("serve_step", "blocks", "step", "blocks"),
    ],
)
def test_a_slightly_wrong_launcher_breaks_the_budget(
    name: str,
    output: str,
    op: str,
    tensor: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--backends", "torch", "--dtypes", "bf16", "--ops", op]
    assert run(tmp_path, *arguments)[0] == 0
    spoil(monkeypatch, name, "torch", output, 1 + 2.0**-7)
    code, found, markdown = run(tmp_path, *arguments)
    assert code == 1
    assert found["ok"] is False
    broken = [row for row in found["rows"] if row["verdict"] == "broken"]
    assert tensor in {row["tensor"] for row in broken}
    assert f"- {op} {tensor} bf16" in markdown
    assert f"broken: {op} {tensor} bf16" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--backends", "cuda"], "--backends: cuda; allowed are torch, triton, cute"),
        (["report", "--dtypes", "fp8,bf16"], "--dtypes: fp8; allowed are bf16, fp16, fp32, bf16/fp32"),
        (["report", "--ops", ","], "--ops: nothing given; allowed are mix, phase1, phase2, step"),
        (["report", "--inputs", "/nowhere.safetensors"], "/nowhere.safetensors: no such file"),
        (["report", "--out", "/proc/version/x"], "/proc/version"),
        (["report", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([], "required: command"),
    ],
)
def test_unusable_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unavailable_backend_is_unusable_only_where_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        attnres.backend, "available_backends", lambda: {"torch": None, "triton": "gone", "cute": "gone"}
    )
    monkeypatch.setattr(cli, "_can_compile_cute", lambda: False)
    assert cli.main(["report", "--backends", "triton"]) == 2
    assert cli.main(["report", "--backends", "cute"]) == 2
    assert "--backends triton: gone" in capsys.readouterr().err
    code, found, _ = run(tmp_path, "--ops", "step", "--dtypes", "bf16")
    assert code == 0
    assert {row["backend"] for row in found["rows"]} == {"torch"}
    assert "triton is left out: gone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"activations": torch.ones(2, 3, 8)}, "needs a tensor 'sources' [L, T, D]; it holds activations"),
        ({"sources": torch.ones(3, 8)}, "'sources' has shape [3, 8], expected a non-empty [L, T, D]"),
        ({"sources": torch.ones(2, 0, 8)}, "'sources' has shape [2, 0, 8], expected a non-empty"),
        (
            {"sources": torch.ones(2, 3, 8), "queries": torch.ones(2, 4)},
            "'queries' has shape [2, 4], expected a non-empty [S, 8]",
        ),
        (
            {"sources": torch.ones(2, 3, 8), "rms_weight": torch.ones(4)},
            "'rms_weight' has shape [4], expected a non-empty [8]",
        ),
        ({"sources": torch.ones(2, 3, 8), "other": torch.ones(4)}, "unknown tensor 'other'"),
        (
            {"sources": torch.ones(2, 3, 8, dtype=torch.int32)},
            "'sources' has dtype torch.int32, expected one of bfloat16, fl",
        ),
        ({"sources": torch.ones(2, 3, 8).to(torch.float8_e4m3fn)}, "'sources' has dtype torch.float8_e4m3fn"),
        ({"sources": torch.full((2, 3, 8), torch.nan)}, "'sources' has NaN or infinite values (in float32): 48 of 48"),
        (
            {"sources": torch.ones(2, 3, 8).double().index_fill(1, torch.tensor(2), 1e39)},
            "'sources' has NaN or infinite values (in float32): 16 of 48, the first at [0, 2, 0]",
        ),
        ({"sources": torch.ones(65, 1, 8)}, "'sources' has 65 sources, at most 64 are mixed"),
    ],
)
def test_bad_activation_files(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(tensors, tmp_path / "bad.safetensors")
    assert cli.main(["report", "--inputs", str(tmp_path / "bad.safetensors")]) == 2
    assert message in capsys.readouterr().err


def test_not_a_safetensors_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.safetensors").write_text("nothing of the kind")
    assert cli.main(["report", "--inputs", str(tmp_path / "bad.safetensors")]) == 2
    assert "not a safetensors file" in capsys.readouterr().err


def test_activations_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.safetensors"
    generator = torch.Generator().manual_seed(1)
    sources = torch.randn(3, 5, 16, generator=generator).bfloat16()
    queries, weight = torch.randn(4, 16, generator=generator), torch.randn(16, generator=generator)
    save_file({"sources": sources, "queries": queries, "rms_weight": weight}, file)
    code, found, _ = run(tmp_path, "--inputs", str(file), "--backends", "torch", "--ops", "mix", "phase1")
    assert code == 0
    assert {row["kind"] for row in found["rows"]} == {"captured"}
    assert {row["shape"] for row in found["rows"]} == {"T5 D16 L3 w norm", "T5 D16 N3 S4 w"}
    assert found["metadata"]["activations"] == "mine: 3 sources, 5 tokens, D 16"
    assert [risk["source"] for risk in found["precision_at_risk"]] == [0, 1, 2]
    assert all(risk["bf16"] == 0 and risk["level"] == "ok" for risk in found["precision_at_risk"])
    case = inputs.make_case("phase1", Shape(5, 16, 3, 4), "captured", "bf16/fp32", capture=inputs.load_capture(file))
    assert torch.equal(torch.stack(case.arguments["block_representations"]), sources)
    assert torch.equal(case.arguments["pseudo_queries"], queries)
    assert torch.equal(case.arguments["rms_weight"], weight)


def test_activations_beyond_fp16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    sources[1, 2, 3] = 70000.0
    save_file({"sources": sources}, tmp_path / "big.safetensors")
    arguments = ["--inputs", str(tmp_path / "big.safetensors"), "--backends", "torch", "--ops", "mix"]
    code, found, markdown = run(tmp_path, *arguments)
    assert code == 0
    assert {row["dtype"] for row in found["rows"]} == {"bf16", "fp32", "bf16/fp32", "fp16_scaled"}
    terminal = capsys.readouterr().out
    assert "fp16 is left out: source 1: values above 65504" in terminal
    risks = found["precision_at_risk"]
    assert [risk["level"] for risk in risks] == ["ok", "at risk", "ok"]
    assert risks[1]["overflow"] == pytest.approx(1 / 80)
    assert risks[1]["fp16"] is None, "infinite"
    for text in (terminal, markdown):
        assert "Precision at risk" in text
        assert "Overflows fp16: 1 of 80 values do not fit" in " ".join(text.replace("\n", " ").split())
    assert cli.main(["report", *arguments, "--dtypes", "fp16"]) == 2
    assert "--dtypes fp16: source 1: values above 65504" in capsys.readouterr().err


@dataclass(frozen=True)
class FakeInspection:
    op: str = "mix_fwd"
    config: str = "D=2048 L=9"
    registers: int = 168
    spill_bytes: int = 0
    shared_bytes: int = 200_000
    instructions: Counter[str] = field(default_factory=lambda: Counter(UBLKCP=2, SYNCS=9, FFMA=300))


@pytest.mark.parametrize(("spill", "code"), [(0, 0), (16, 1)])
def test_cute_without_gpu_is_compiled(spill: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cute_kernels.inspect

    reasons = {"torch": None, "triton": None, "cute": "no CUDA device"}
    monkeypatch.setattr(attnres.backend, "available_backends", lambda: reasons)
    monkeypatch.setattr(cute_kernels.inspect, "compile_all", lambda: iter([FakeInspection(spill_bytes=spill)]))
    got, found, markdown = run(tmp_path, "--backends", "cute")
    assert got == code
    assert found["rows"] == []
    (kernel,) = found["kernels"]
    assert (kernel["registers"], kernel["spill_bytes"], kernel["shared_bytes"]) == (168, spill, 200_000)
    assert kernel["instructions"] == {"UBLKCP": 2, "SYNCS": 9, "FFMA": 300}
    assert "compiled, not run: " in found["metadata"]["cute"]
    assert f"| mix_fwd | D=2048 L=9 | 168 | {spill} | 200000 | 2 | 9 | 0 | {'broken' if spill else 'ok'} |" in markdown


def _pretend_cute(monkeypatch: pytest.MonkeyPatch, factor: float, refuses: str = "") -> None:
    """A cute backend that computes with torch's results, off by a factor in its outputs, and refuses one dtype."""
    original = report.call

    def call(case: inputs.Case, backend: str) -> report.Results:
        if backend != "cute":
            return original(case, "torch")
        if case.dtype == refuses:
            raise BackendError("cute mix_fwd takes bfloat16 or float16 storage, not torch.float32")
        found = original(case, "torch")
        return {**found, "out": found["out"] * factor}

    monkeypatch.setattr(report, "call", call)


def _small_jobs(*dtypes: str) -> list[report.Job]:
    return [report.Job("mix", Shape(64, 128, 3), "normal", dtype) for dtype in dtypes]


def test_processes_report_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [
        *_small_jobs("bf16", "fp16"),
        report.Job("phase2", Shape(16, 64, 3), "outliers", "fp16_scaled+stochastic"),
    ]
    found = []
    for workers in (1, 2):
        monkeypatch.setattr(report, "_workers", lambda *_, workers=workers: workers)
        done: list[str] = []
        made = report.run(chosen, ["torch", "triton"], torch.device("cpu"), progress=done.append)
        assert done == [str(job) for job in chosen]
        found.append((made.rows, made.pairs))
    assert found[0] == found[1]
    assert len({(row.op, row.dtype) for row in found[0][0]}) == len(chosen)


def test_cute_may_not_be_worse_than_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for factor, broken in ((1.0, False), (1 + 2.0**-10, True)):
        with monkeypatch.context() as patch:
            _pretend_cute(patch, factor)
            # float32, where the factor is far above the noise
            found = report.run(_small_jobs("fp32"), ["triton", "cute"], torch.device("cpu"))
        verdicts = {pair.tensor: pair.verdict for pair in found.pairs}
        assert verdicts == {name: "worse" if broken and name == "out" else "ok" for name in verdicts}
        assert found.ok is not broken
        lines = [report_output.describe(item) for item in found.broken]
        assert any("cute is worse than triton" in line for line in lines) is broken


def test_not_worse() -> None:
    case = inputs.make_case("mix", Shape(64, 128, 3))
    reference = oracle.reference(case.op, case.arguments)["out"]
    measured = judge_reference(reference.exact.bfloat16(), reference)
    floor = measured.floor
    assert report.not_worse(1.009 * floor, floor, measured, "output")
    assert not report.not_worse(1.011 * floor, floor, measured, "output")
    assert report.not_worse(1.03 * floor, 1.025 * floor, measured, "output")
    assert report.not_worse(2.4e-7, 1e-8, measured, "statistic")


def test_refusals_are_rows_and_an_error_only_if_nobody_takes_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_cute(monkeypatch, 1.0, refuses="fp32")
    found = report.run(_small_jobs("bf16", "fp32"), ["torch", "cute"], torch.device("cpu"))
    assert found.ok
    (refused,) = [row for row in found.rows if row.verdict == "refused"]
    assert (refused.backend, refused.dtype) == ("cute", "fp32")
    assert refused.note == "cute mix_fwd takes bfloat16 or float16 storage, not torch.float32"
    assert "1 cases: cute mix_fwd takes" in report_output.to_markdown(found)
    alone = report.run(_small_jobs("fp32"), ["cute"], torch.device("cpu"))
    assert not alone.ok
    assert "no backend of this run takes it: cute mix_fwd takes" in report_output.describe(alone.broken[0])


def gate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Exit code and printed lines of `attnres report --gate`."""
    code = cli.main(["report", "--gate", *arguments])
    printed = capsys.readouterr()
    assert printed.err == ""
    return code, printed.out.splitlines()


def test_the_gate_is_terse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--backends", "torch", "--dtypes", "bf16", "--ops", "step"]
    assert gate(capsys, *arguments) == (0, ["9 rows, 0 comparisons, 0 kernels: 0 failed"])
    assert list(tmp_path.iterdir()) == []
    spoil(monkeypatch, "serve_step", "torch", "out", 1 + 2.0**-7)
    code, lines = gate(capsys, *arguments)
    assert code == 1
    assert len(lines) == 4
    assert all(line.startswith("broken: step out bf16, ") for line in lines[:3])
    assert lines[3] == "9 rows, 0 comparisons, 0 kernels: 3 failed"
    assert gate(capsys, *arguments, "--out", "kept") == (1, lines)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["report.html", "report.json", "report.md"]


@pytest.mark.parametrize(("named", "code"), [(True, 1), (False, 0)])
def test_the_gate_fails_on_a_refusal_of_what_was_asked_for(
    named: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {"torch": None, "triton": "gone", "cute": None}
    monkeypatch.setattr(attnres.backend, "available_backends", lambda: reasons)
    _pretend_cute(monkeypatch, 1.0, refuses="fp32")
    arguments = ["--dtypes", "fp32", "--ops", "mix", *(["--backends", "torch", "cute"] if named else [])]
    got, lines = gate(capsys, *arguments)
    assert got == code
    if named:
        assert lines[0].startswith("refused: mix fp32, T3 D24 L3 w norm, normal, cute: cute mix_fwd takes bfloat16 or")
    assert lines[-1].endswith(f"0 kernels: {2 * named} failed")


@pytest.mark.parametrize(("named", "code"), [(True, 1), (False, 0)])
def test_the_gate_fails_on_what_was_not_run(
    named: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cute_kernels.inspect

    reasons = {"torch": None, "triton": "gone", "cute": "no CUDA device"}
    monkeypatch.setattr(attnres.backend, "available_backends", lambda: reasons)
    monkeypatch.setattr(cute_kernels.inspect, "compile_all", lambda: iter([FakeInspection()]))
    arguments = ["--dtypes", "bf16", "--ops", "step", *(["--backends", "torch", "cute"] if named else [])]
    got, lines = gate(capsys, *arguments)
    assert got == code
    if named:
        assert lines[0].startswith("not run: cute, compiled, not run: ")
    assert lines[-1] == f"9 rows, 0 comparisons, 1 kernels: {int(named)} failed"


def test_the_gate_fails_on_a_comparison(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(attnres.backend, "available_backends", lambda: dict.fromkeys(("torch", "triton", "cute")))
    _pretend_cute(monkeypatch, 1 + 2.0**-20)
    code, lines = gate(capsys, "--backends", "triton", "cute", "--dtypes", "fp32", "--ops", "mix")
    assert code == 1
    assert any("cute is worse than triton" in line for line in lines)


def test_numbers_that_are_not_finite_are_null_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_cute(monkeypatch, float("nan"))
    found = report.run(_small_jobs("bf16"), ["cute"], torch.device("cpu"))
    (row,) = [row for row in json.loads(report_output.to_json(found))["rows"] if row["tensor"] == "out"]
    assert row["verdict"] == "broken"
    assert row["error"] is None
    assert row["floor"] > 0


def test_info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ATTNRES_BACKEND", "torch")
    assert cli.main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    values = {name.strip(): value.strip() for name, value in lines.items()}
    assert values["ATTNRES_BACKEND"] == "torch"
    assert values["backend torch"] == "available"
    assert values["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert values["backend cute"].startswith("unavailable: ")


def test_cases_are_reproducible_and_as_described() -> None:
    for op in inputs.OPS:
        for kind in inputs.KINDS:
            first, second = (inputs.make_case(op, Shape(4, 384, 5, 2), kind, "fp16", seed=3) for _ in range(2))
            for name, value in first.arguments.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value.nan_to_num(), second.arguments[name].nan_to_num())
                    assert not value.isinf().any(), "overflow of fp16"
    step = inputs.make_case("step", Shape(4, 16, 3)).arguments
    assert step["num_blocks"] == step["block_write_idx"] == 2
    assert step["blocks"][:, 2:].isnan().all()
    depth = inputs.make_case("mix", Shape(64, 256, 5), "depth", "fp32").arguments["residuals"]
    rms = [float(source.square().mean().sqrt()) for source in depth]
    assert rms == pytest.approx([0.15 * 2 ** (9 * i / 4) for i in range(5)], rel=0.05)
    peaked = inputs.make_case("mix", Shape(256, 256, 5), "peaked", "fp32")
    weights = oracle.mix(**peaked.arguments).weights
    assert weights.amax(0).median() > 0.999
    ties = inputs.make_case("mix", Shape(256, 256, 5), "ties", "bf16")
    assert (oracle.mix(**ties.arguments).weights - 0.2).abs().max() < 0.05
    outliers = inputs.make_case("mix", Shape(16, 256, 2), "outliers", "fp16").arguments["residuals"]
    assert outliers[0].abs().max() > 100


def test_shipped_activations() -> None:
    capture = inputs.captured_sources()
    assert capture.sources.shape == (13, 144, 384)
    assert capture.sources.dtype == torch.float32
    rms = capture.sources.square().mean((1, 2)).sqrt()
    assert 10 < rms.max() / rms.min() < 30
    assert 178 < capture.sources.abs().max() < 179
    file = Path(inputs.__file__).parent / "data" / "captured_sources.safetensors"
    assert file.stat().st_size <= 3_000_000


def test_the_largest_difference_is_a_number_if_any_case_has_one() -> None:
    # both overflow fp16 in one case: infinity minus infinity
    differences = (math.nan, 1e-4, 2e-4, math.nan)
    pairs = [report.Pair("mix", "out", "fp16", "", "", "torch", "triton", size, 0.0, 0.0) for size in differences]
    assert [pair.difference for pair in report_lines.largest_difference_of_each_tensor(pairs)] == [2e-4]
    worse = report.Pair("mix", "out", "fp16", "", "", "torch", "triton", 1e-9, 0.0, 0.0, "worse")
    assert report_lines.largest_difference_of_each_tensor([*pairs, worse]) == [worse]

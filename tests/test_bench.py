"""The benchmark suite without a GPU: the least-byte model, the bindings of ours, and what is made of a results file."""

import contextlib
import ctypes
import functools
import json
import os
import subprocess
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import attnres
from attnres import report
from bench import autotune, host, network, ops, plots, profile, providers, readme, results, run, timing, warm
from bench.ops import CASES, Case
from bench.providers import PROVIDERS, Provider, Unsupported


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


ELEMENTS = {
    "direct forward T8192 D7168 L9": 10,
    "direct forward, norm T16384 D4096 L5": 6,
    "direct backward T16384 D2048 L17": 35,
    "phase 1 forward T16384 D2048 N4 S8": 12,
    "phase 1 backward T16384 D2048 N4 S8": 16,
    "phase 2 forward T16384 D2048": 3,
    "phase 2 forward, delta and norm T16384 D7168": 5,
    "phase 2 backward T16384 D2048": 5,
    "phase 2 backward, delta and norm T16384 D4096": 6,
    "serving step T8192 D7168 L9": 12,
    "decode step T1 D7168 L9": 12,
}


@pytest.mark.parametrize(("name", "rows"), ELEMENTS.items())
def test_least_bytes(name: str, rows: int) -> None:
    case = named(name)
    assert case.least_bytes == rows * case.shape.tokens * case.shape.hidden_size * 2


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_input_sets_do_not_fit_l2() -> None:
    l2 = 60 * 2**20
    for case in CASES:
        assert 1 <= case.sets(l2) <= 1024
        assert case.sets(l2) * case.least_bytes >= l2, case.name


def small(case: Case) -> Case:
    return replace(case, shape=replace(case.shape, tokens=5, hidden_size=72))


SMALL = [
    small(named(name))
    for name in (
        "direct forward, norm T8192 D7168 L9",
        "direct forward, stacked T8192 D7168 L9",
        "direct backward T8192 D7168 L9",
        "phase 1 forward T8192 D4096 N8 S16",
        "phase 1 backward T8192 D4096 N8 S16",
        "phase 2 forward, delta and norm T16384 D2048",
        "phase 2 backward T16384 D2048",
        "phase 2 backward, delta and norm T16384 D2048",
        "serving step T8192 D7168 L9",
        "direct backward, fp16 T8192 D7168 L9",
        "phase 1 forward, scaled fp16 T8192 D4096 N8 S16",
        "phase 1 forward, scaled fp16 sources T8192 D4096 N8 S16",
        "phase 2 forward, scaled fp16 T16384 D2048",
        "phase 2 forward, delta and norm, scaled fp16 T16384 D2048",
        "phase 2 forward, delta and norm, stochastic rounding T16384 D2048",
        "phase 1 backward, stochastic rounding T8192 D4096 N8 S16",
        "direct forward, scaled fp16 sources T8192 D7168 L9",
        "serving step, scaled fp16 sources T8192 D7168 L9",
    )
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_ours_are_checked_against_the_oracle(case: Case) -> None:
    provider = Provider("ours-torch", lambda: providers._ours("torch"), ours=True)
    made = ops.make_inputs(case, "cpu")
    exact = ops.sample(case, made)
    call = bind(provider, case, made)
    tensor, errors = ops.check(call(), exact)
    assert errors.ok, (tensor, errors)
    wrong = {
        name: [2 * v for v in value] if isinstance(value, list) else twice(value) for name, value in call().items()
    }
    assert not ops.check(wrong, exact)[1].ok


def twice(value: torch.Tensor | attnres.ScaledTensor) -> torch.Tensor | attnres.ScaledTensor:
    if isinstance(value, attnres.ScaledTensor):
        return attnres.ScaledTensor(value.values, 2 * value.scale, value.dtype)
    return 2 * value


def bind(provider: Provider, case: Case, made: ops.Inputs) -> providers.Call:
    """Provider.bind of a provider that is not in the table."""
    providers.PROVIDERS[provider.name] = provider
    try:
        return provider.bind(case, made)
    finally:
        del providers.PROVIDERS[provider.name]


def test_plain_formula_agrees_with_the_oracle() -> None:
    case = small(named("direct forward T8192 D7168 L9"))
    made = ops.make_inputs(case, "cpu")
    a = made.arguments
    out = providers.plain_mix(a["residuals"], a["query"], a["rms_weight"], a["rms_eps"])
    assert ops.check({"out": out}, ops.sample(case, made))[1].ok


def test_fla_gets_the_step_as_add_and_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its binding, with the reference formula in place of the package."""
    module = types.ModuleType("fla.ops.attnres")
    module.fused_attnres = attnres.attn_res  # the same argument list
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.attnres", module)
    case = small(named("serving step T8192 D7168 L9"))
    made = ops.make_inputs(case, "cpu")
    exact = ops.sample(case, made)
    provider = Provider("a-peer", providers._fla)
    assert ops.check(bind(provider, case, made)(), exact)[1].ok
    assert torch.equal(made.arguments["prefix"], ops.make_inputs(case, "cpu").arguments["prefix"])


@pytest.mark.parametrize("backward", [False, True])
def test_a_switch_is_on_whenever_the_forward_runs(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_SWITCH", raising=False)
    seen = []

    def mix(a: providers.Arguments) -> providers.Call:
        def run() -> providers.Results:
            seen.append(os.environ.get("A_SWITCH"))
            return {"out": attnres.attn_res(**a)}

        return run

    case = small(replace(named("direct forward T8192 D7168 L9"), backward=backward))
    provider = Provider(f"switched {backward}", lambda: {"mix": mix}, environment={"A_SWITCH": "1"})
    bind(provider, case, ops.make_inputs(case, "cpu"))()
    assert seen == ["1"]
    assert "A_SWITCH" not in os.environ


def test_missing_provider_says_why() -> None:
    def load() -> dict[str, Any]:
        raise ImportError("no such wheel")

    broken = Provider("broken", load)
    providers.PROVIDERS["broken"] = broken
    try:
        assert broken.missing() == "not installed: ImportError: no such wheel"
    finally:
        del providers.PROVIDERS["broken"]
    assert providers.PROVIDERS["ours-cute"].missing() == attnres.available_backends()["cute"]
    assert Provider("ours-torch", lambda: providers._ours("torch"), ours=True).missing() is None
    console = Console(width=100, record=True, quiet=False)
    providers.tell_missing({"liger": "not there"}, False, console)
    assert console.export_text() == "liger: not there\n"
    with pytest.raises(SystemExit, match="liger: not there"):
        providers.tell_missing({"liger": "not there"}, True, console)


def test_cute_does_not_borrow_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = named("direct backward T8192 D7168 L9")
    monkeypatch.setattr(providers.backends, "refusal", lambda name, spec: f"{spec.op} has no kernel on {name}")
    with pytest.raises(providers.Unsupported, match="mix_bwd has no kernel on cute"):
        providers._refuse_other_backend("cute", case)


def test_peers_skip_what_they_cannot_tell_apart_or_compile_slowly() -> None:
    stacked, grid = named("direct forward, stacked T8192 D7168 L9"), named("direct forward T8192 D2304 L9")
    assert [name for name, p in PROVIDERS.items() if p.wants(stacked)] == ["ours-cute", "ours-triton"]
    assert not PROVIDERS["torch.compile"].wants(grid)
    assert not PROVIDERS["fla-gluon"].wants(grid)
    assert PROVIDERS["fla-triton"].wants(grid)


def test_time_limit_passes_a_handler_of_exceptions() -> None:
    def swallow() -> None:
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    with pytest.raises(timing.OutOfTime), timing.limit(0.05):
        swallow()


def test_summary() -> None:
    found = timing.summary([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (found["us"], found["p20"], found["p80"]) == (3.0, 1.8, 4.2)
    assert timing.summary([2.0])["p80"] == 2.0


def fake() -> results.Results:
    """A run on a device with 4 TB/s where ours takes 1.25 x the least time."""
    cases = [
        named("direct forward T8192 D7168 L9"),
        named("direct forward T8192 D2304 L9"),
        named("phase 1 forward T16384 D2048 N4 S8"),
        named("decode step T1 D7168 L9"),
        named("decode step T16 D7168 L9"),
    ]
    found = []
    for case in cases:
        least = case.least_bytes / 4e6
        entry = {**results.entry(case), "copy": timing.summary([timing.COPY_BYTES / 4e6])}
        entry["results"] = {
            "ours-cute": {**timing.summary([1.25 * least]), "error": 1.7e-3, "floor": 1.66e-3, "within_budget": True},
            "fla-triton": {**timing.summary([2 * least]), "error": 5e-3, "floor": 1.66e-3, "within_budget": False},
            "liger": {"status": "failed: RuntimeError: out of resources"},
        }
        found.append(entry)
    versions = {"torch": "2.11", "triton": "3.6", "nvidia-cutlass-dsl": "4.8.1", "kernel sources": "0123456789abcdef"}
    return {
        "metadata": {
            "device": "NVIDIA H200",
            "driver": "580",
            "date": "2026-11-24T00:00",
            "clocks at start": "1980 MHz",
            "providers": {"fla-triton": "0.6.0", "flash-attn-res": ""},
            **versions,
        },
        "missing": {"flash-attn-res": "not installed: ModuleNotFoundError: No module named 'flash_attn_res'"},
        "cases": found,
        "host": {"direct mix": {"ours-cute": 8.25, "fla-triton": 31.0}},
        "first_call": {"ours-cute": {"cold": {"direct mix": 2.5}, "from disk": "failed: no message"}},
    }


def test_share_is_of_the_copy_in_the_same_rounds() -> None:
    case = fake()["cases"][0]
    assert results.share(case, "ours-cute") == pytest.approx(0.8)
    assert results.share(case, "liger") is None


def test_markdown() -> None:
    text = results.to_markdown(fake())
    assert "| shape | ours-cute | fla-triton |" in text
    assert "| T8192 D7168 L9 | **0.800** | 0.500 (error 5.0e-03) |" in text
    assert "decode step: µs per call in a CUDA graph" in text
    assert "| direct mix | 8.2 | 31.0 |" in text
    assert "| ours-cute, cold | 2.50 |" in text
    assert "D2304" not in results.to_markdown(fake(), headline_only=True)


def test_terminal_tables_name_what_is_missing() -> None:
    console = Console(width=200, record=True, quiet=True)
    console.quiet = False
    results.print_tables(fake(), console)
    text = console.export_text()
    assert "0.800" in text
    assert "flash-attn-res: not installed" in text
    assert "liger: failed: RuntimeError: out of resources" in text


def test_plots(tmp_path: Path) -> None:
    written = plots.write(fake(), tmp_path / "bench_h200.json")
    names = ["decode_h200.png", "decode_h200.svg", "shares_h200.png", "shares_h200.svg"]
    assert sorted(path.name for path in written) == names
    assert all(path.stat().st_size > 1000 for path in written)
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in plots.write(fake(), tmp_path / "bench_h200.json")] == before


def test_plots_of_nothing(tmp_path: Path) -> None:
    assert plots.write({**fake(), "cases": []}, tmp_path / "bench_h200.json") == []


def test_save_and_path(tmp_path: Path) -> None:
    path = results.path_in(tmp_path, "NVIDIA H100 80GB HBM3")
    assert path.name == "bench_h100-80gb-hbm3.json"
    results.save(fake(), path)
    assert json.loads(path.read_text())["cases"][0]["name"] == "direct forward T8192 D7168 L9"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_readme_keeps_what_is_outside_the_markers(tmp_path: Path) -> None:
    target = tmp_path / "README.md"
    target.write_text(f"# a\n\n{readme.BEGIN}\nbefore\n{readme.END}\n\n## z\n")
    path = results.path_in(tmp_path / "bench" / "results", "NVIDIA H200")
    results.save(fake(), path)
    for _ in range(2):
        assert readme.main(["--results", str(path.parent), "--readme", str(target)]) == 0
        text = target.read_text()
        assert text.startswith(f"# a\n\n{readme.BEGIN}\n\n### NVIDIA H200")
        assert text.endswith(f"{readme.END}\n\n## z\n")
        assert "before" not in text
        assert "(bench/results/shares_h200.png)" in text
        assert (path.parent / "shares_h200.png").is_file()
        assert "4.00 TB/s" in text
        assert "earlier sources" in text


def test_readme_has_every_device_the_newest_first(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{readme.BEGIN}{readme.END}")
    for device, date in (("NVIDIA H200", "2026-11-24"), ("NVIDIA H100 80GB HBM3", "2026-11-28")):
        found = fake()
        found["metadata"] |= {"device": device, "date": date, "kernel sources": report.source_digest()}
        results.save(found, results.path_in(tmp_path, device))
    assert readme.main(["--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.index("### NVIDIA H100 80GB HBM3") < text.index("### NVIDIA H200")
    assert "these sources" in text
    assert "earlier sources" not in text
    assert "shares_h100-80gb-hbm3.png" in text


@pytest.mark.parametrize(
    "text", ["nothing", f"{readme.END}{readme.BEGIN}", f"{readme.BEGIN}{readme.BEGIN}{readme.END}"]
)
def test_readme_without_its_markers(text: str) -> None:
    with pytest.raises(ValueError, match="needs one"):
        readme.between_markers(text, "body")


def test_readme_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--results", str(tmp_path)]) == 2
    assert "make bench" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_run_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == 2
    assert "need a CUDA device" in capsys.readouterr().err


def test_run_names_what_it_does_not_know() -> None:
    with pytest.raises(SystemExit, match="unknown provider vllm"):
        run.main(["--providers", "vllm"])
    with pytest.raises(SystemExit, match="no case has 'nothing'"):
        run.main(["--cases", "nothing"])


def test_a_run_keeps_going_past_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run on the CPU, with our torch backend, a peer that fails, one that is missing, and a clock of our own."""

    def fails(_: providers.Arguments) -> providers.Call:
        raise RuntimeError("out of resources")

    def wrong(arguments: providers.Arguments) -> providers.Call:
        return lambda: {"out": arguments["residuals"][0]}

    def missing() -> dict[str, Any]:
        raise ImportError("no such wheel")

    chosen = [
        Provider("ours-torch", lambda: providers._ours("torch"), ours=True),
        Provider("fails", lambda: {"mix": fails}),
        Provider("wrong", lambda: {"mix": wrong}),
        Provider("missing", missing),
    ]
    for provider in chosen:
        monkeypatch.setitem(providers.PROVIDERS, provider.name, provider)
    steady = timing.Timed(lambda: None, 1, 1, 0.0)
    monkeypatch.setattr(timing, "copy", lambda device: steady)
    monkeypatch.setattr(timing, "eager", lambda calls, seconds: steady)
    monkeypatch.setattr(timing, "graph", lambda calls, seconds: steady)
    monkeypatch.setattr(timing, "_burst", lambda timed: 100.0)
    monkeypatch.setattr(timing, "workspace", lambda call: 3 * 2**19)
    monkeypatch.setattr(results, "metadata", lambda device: {**fake()["metadata"], "l2_bytes": 1000})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(plots, "write", lambda data, folder: [])
    console = Console(width=200, record=True, quiet=False)
    path = results.path_in(tmp_path, "NVIDIA H200")
    suite = run.Suite(torch.device("cpu"), chosen, path, 3, 60.0, console)
    decode = replace(small(named("decode step T16 D7168 L9")), headline=True)
    assert run._measure(suite, [SMALL[0], SMALL[2], decode], quick=True) == 0
    found = json.loads(path.read_text())
    assert found["missing"] == {"missing": "not installed: ImportError: no such wheel"}
    first, backward, step = (case["results"] for case in found["cases"])
    assert first["ours-torch"]["samples"] == [100.0] * 3
    assert first["ours-torch"]["within_budget"]
    assert first["fails"] == {"status": "failed: RuntimeError: out of resources"}
    assert not first["wrong"]["within_budget"]
    assert backward["ours-torch"]["checked"].startswith("d_")
    assert step["wrong"] == {"status": "not supported: no decode step"}
    assert "fails: failed: RuntimeError" in console.export_text()
    assert f"| {SMALL[2].name} | 1.5 |" in path.with_suffix(".md").read_text()

    found["cases"][0]["results"]["late"] = {"status": "skipped: time budget spent"}
    found["stopped"] = "KeyboardInterrupt"
    path.write_text(json.dumps(found))
    resumed = run.Suite(torch.device("cpu"), chosen, path, 3, 60.0, console, resume=True)
    assert results.left(resumed.data, [SMALL[0], SMALL[2], decode]) == [SMALL[0]]
    assert run._measure(resumed, [SMALL[0]], quick=True) == 0
    again = json.loads(path.read_text())
    assert sorted(case["name"] for case in again["cases"]) == sorted(case["name"] for case in found["cases"])
    assert again["metadata"]["resumed"][0]["seconds"] >= 0
    assert "stopped" not in again

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "measure", interrupted)
    resumed = run.Suite(torch.device("cpu"), chosen, path, 3, 60.0, console, resume=True)
    assert run._measure(resumed, [SMALL[1]], quick=True) == 1
    stopped = json.loads(path.read_text())
    assert stopped["stopped"].startswith("KeyboardInterrupt")
    assert stopped["cases"] == again["cases"]

    other = {**fake()["metadata"], "l2_bytes": 1000, "kernel sources": "of another day"}
    monkeypatch.setattr(results, "metadata", lambda device: other)
    with pytest.raises(SystemExit, match="another kernel sources"):
        run.Suite(torch.device("cpu"), chosen, path, 3, 60.0, console, resume=True)


def test_summary_against_the_fastest_peer() -> None:
    """Ours takes 1.25 x the least time, the peer twice: at the one headline case 0.80 of the copy against 0.50."""
    text = results.markdown(results.against_peers(fake()))
    assert "| direct forward | 0.80 | 0.50 (fla-triton) | 1.60 x |" in text
    assert "| decode step |" in text
    assert "liger" not in text


def test_networks_in_the_readme(tmp_path: Path) -> None:
    timed = {"us": 12400.0, "peak_gib": 4.0}
    case = {"name": "network forward T1", "results": {"ours-cute": timed, "liger": {"status": "failed: no"}}}
    networks = {"metadata": fake()["metadata"], "cases": [case]}
    path = tmp_path / "bench_h200.json"
    assert "Networks" not in readme.section(fake(), path, "results")
    results.save(networks, tmp_path / "network_h200.json")
    assert "| forward T1 | 12.40 (4.0) | failed |" in readme.section(fake(), path, "results")


@pytest.mark.gpu
def test_gpu_workspace_is_what_is_held_besides_the_results() -> None:
    kept = torch.empty(2**20, device="cuda", dtype=torch.uint8)

    def call() -> torch.Tensor:
        scratch = torch.empty(2**22, device="cuda", dtype=torch.uint8)
        return scratch[: 2**20] + kept

    assert timing.workspace(call) == 2**22


def test_storage_formats_are_compared_with_bf16() -> None:
    data = fake()
    plain = data["cases"][2]
    stored = {**plain, **results.entry(named("phase 1 forward, scaled fp16 T16384 D2048 N4 S8")), "copy": plain["copy"]}
    stored["results"] = {"ours-cute": timing.summary([1.03 * plain["results"]["ours-cute"]["us"]])}
    data["cases"].append(stored)
    text = results.to_markdown(data)
    assert "| phase 1 forward, scaled fp16 T16384 D2048 N4 S8 | 1.030 |" in text
    assert "scaled fp16" not in results.to_markdown(fake())


def test_configurations_are_compiled_side_by_side_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton import testing
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(testing, "do_bench", testing.do_bench)
    monkeypatch.setattr(Autotuner, "prune_configs", Autotuner.prune_configs)

    @triton.autotune([triton.Config({"B": b}, num_warps=w) for b in (1, 2) for w in (4, 8)], key=["n"])
    @triton.jit
    def kernel(n, B: triton.language.constexpr):
        pass

    compiled, meet = [], threading.Barrier(4, timeout=20)

    class Kernel:
        def run(self, **given: Any) -> None:
            meet.wait()  # none returns before all have begun
            compiled.append((given["n"], given["B"], given["num_warps"], given["warmup"]))
            raise RuntimeError("out of resources")

    autotune.speed_up(threads=4)
    autotune.speed_up(threads=4)  # once is enough
    kernel.fn, kernel.nargs = Kernel(), {"n": 3}
    assert kernel.prune_configs({"grid": (1,), "warmup": False}) == kernel.configs
    assert sorted(compiled) == [(3, b, w, True) for b in (1, 2) for w in (4, 8)]
    assert testing.do_bench.keywords == {"warmup": 5, "rep": 20}


def first_call(case: str, provider: str) -> None:
    """Of a peer that compiles for minutes, in a process of its own; of one that fails; of one that takes the process with it."""
    if provider == "slow":
        compiler = subprocess.Popen(["sleep", "300"])
        Path(case).write_text(str(compiler.pid))
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # as a backward keeps the main thread: no signal brings it back to Python
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    if provider == "wrong":
        raise Unsupported("no such operation")
    if provider == "broken":
        os._exit(7)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_first_calls_that_take_too_long_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=20))
    console = Console(record=True, width=120)
    pid = tmp_path / "pid"
    others = [(str(case), provider) for case, provider in enumerate(["good", "wrong", "broken", "good", "good"])]
    stopped = warm.first_calls(first_call, [(str(pid), "slow"), *others], 15, 9, console)
    assert stopped == {(str(pid), "slow"): "failed: no first call in 15 s"}
    assert not alive(int(pid.read_text()))
    told = console.export_text()
    assert "2 processes: 3 made" in told
    assert "1 stopped after 15 s" in told
    assert "1 Unsupported" in told
    assert "1 ProcessExpired 7" in told


def test_first_calls_are_made_once_for_all_that_need_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def first_calls(call: Any, jobs: list[warm.Job], seconds: float, *_: Any) -> dict[warm.Job, str]:
        assert call is run.first_call
        asked[:] = jobs
        stopped = [job for job in jobs if job[1] == "fla-triton" and job[0].startswith("direct forward T8192 D2048")]
        return dict.fromkeys(stopped, f"failed: no first call in {seconds:.0f} s")

    monkeypatch.setattr(warm, "first_calls", first_calls)
    suite = object.__new__(run.Suite)
    suite.providers, suite.peer_seconds, suite.console = list(PROVIDERS.values()), 1.0, Console()
    suite.compile(CASES)
    assert all(PROVIDERS[provider].wants(named(case)) for case, provider in asked)
    ours = [provider.startswith("ours") for _, provider in asked]
    assert ours == sorted(ours)  # the others come first
    # L 2, 5 and 9 of FLA's forward at one size are two kernels: it rounds the depth up
    fla = [
        case for case, provider in asked if provider == "fla-triton" and case.startswith("direct forward T8192 D2048")
    ]
    assert 1 <= len(fla) < 4
    for depth in (2, 5, 9, 17):
        found, timed = suite._prepare(named(f"direct forward T8192 D2048 L{depth}"), PROVIDERS["fla-triton"], [], None)
        assert found == {"status": "failed: no first call in 120 s"}
        assert timed is None
    suite.peer_seconds = 0.0
    suite.compile(CASES)
    assert all(provider.startswith("ours") for _, provider in asked)


def test_a_resumed_run_keeps_what_was_timed_until_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = {**fake()["metadata"], "l2_bytes": 1000}
    monkeypatch.setattr(results, "metadata", lambda device: metadata)
    monkeypatch.setattr(timing, "copy", lambda device: None)
    copy, skipped = {"us": 1.0}, {"status": "skipped: time budget spent"}
    cases = [
        {"name": CASES[0].name, "copy": copy, "results": {"ours-cute": {"us": 1.0}}},
        {"name": CASES[1].name, "copy": copy, "results": {"ours-cute": {"us": 1.0}, "liger": skipped}},
        {"name": CASES[2].name, "results": {"ours-cute": {"us": 1.0}}},
    ]
    path = results.path_in(tmp_path, "NVIDIA H200")
    results.save({"metadata": metadata, "cases": cases, "stopped": "KeyboardInterrupt"}, path)
    suite = run.Suite(torch.device("cpu"), [], path, 1, 1.0, Console(), resume=True)
    assert [case["name"] for case in suite.data["cases"]] == [CASES[0].name, CASES[1].name]
    assert "stopped" not in suite.data
    assert suite.data["metadata"]["resumed"] == [{"date": metadata["date"], "clocks": metadata["clocks at start"]}]
    assert results.left(suite.data, CASES[:4]) == list(CASES[1:4])


def test_host_cases_are_forward() -> None:
    assert all(not case.backward for case in host.SMALL_CASES.values())
    assert set(host.HOST_PROVIDERS + host.FIRST_CALL_PROVIDERS) <= set(PROVIDERS)


# --- whole networks ---


def test_a_resumed_run_of_networks_repeats_what_failed() -> None:
    names = [case.name for case in network.CASES]
    found = {"ours-cute": {"us": 1.0}}
    cases = [
        {"name": names[0], "results": found},
        {"name": names[2], "results": {**found, "fla-triton": {"status": "failed"}}},
    ]
    assert [case.name for case in network.left({"cases": cases})] == names[1:]


def test_network_schedule_bytes() -> None:
    """Blocks of 2: direct mixes 2 + 3 and the last sum 3, then two phases 2 + 2 + 3 and 3, then the output's mix 4."""
    rows = 10 * 8 * 2
    forward = network.NetworkCase("forward", 10, 8, 4, 2)
    assert forward.least_bytes == (8 + 10 + 4) * rows
    backward = replace(forward, group="forward and backward")
    first, second = 2 * 6 + 3 + 6 + 2 + 3 + 2, 7 + 3 + 6 + 2 + 6 + 2
    assert backward.least_bytes == (first + second + 4 + 7) * rows
    serving = network.NetworkCase("serving block", 10, 8, 24, 24, num_blocks=8)
    assert serving.least_bytes == (8 + 24 + 3 + 22 * 5) * rows


@pytest.mark.parametrize("kind", ["identity", "swiglu"])
def test_networks_are_checked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(network.NETWORKS, "ours-torch", lambda case: network.ours("torch", case))
    keeping = network.KEEPING["ours-cute, memory_saving=False"]
    kept = functools.partial(keeping.func, "torch", **keeping.keywords)
    monkeypatch.setitem(network.KEEPING, "ours-torch, memory_saving=False", kept)
    monkeypatch.setitem(
        network.NETWORKS,
        "plain",
        lambda case: network.site_by_site(lambda v, q: attnres.attn_res(q, v, rms_eps=network.EPS), case),
    )
    for case in network._networks(100, 24, 5, 2, kind=kind):
        made = network.make(case, "cpu")
        assert (kept in case.providers.values()) == case.backward
        for provider in ("ours-torch", "plain", "ours-torch, memory_saving=False")[: 2 + case.backward]:
            found = network.check(case, made, network.bind(case, provider, made)())
            assert 0 < found["out error"] < 0.02
            assert not case.backward or 0 < found["d_inputs error"] < 0.03


def test_serving_blocks_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = network.NetworkCase("serving block", 70, 24, 6, 6, num_blocks=3)
    made = network.make(case, "cpu")
    scaled = functools.partial(network.two_phases, storage="fp16_scaled")
    for binding in (network.two_phases, scaled, network.direct_sites):
        monkeypatch.setitem(
            network.SERVING, "ours-torch", lambda case, made, binding=binding: binding("torch", case, made)
        )
        found = network.check(case, made, network.bind(case, "ours-torch", made)())
        assert 0 < found["out error"] < 0.006
    made.deltas[2].add_(1)
    assert network.check(case, made, {"out": torch.zeros(70, 24, dtype=torch.bfloat16)})["out error"] > 0.5


def test_a_network_whose_first_call_was_stopped_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    case = network.NetworkCase("forward", 100, 24, 5, 2)
    monkeypatch.setattr(timing, "copy", lambda device: None)
    monkeypatch.setattr(timing, "measure", lambda timed, rounds: ({name: [1.0] for name in timed}, {}))
    options = types.SimpleNamespace(rounds=1)
    stopped = {(case.name, "flash-attn-res"): "failed: no first call in 9 s"}
    entry = network.measure(case, ["flash-attn-res", "fla-triton"], stopped, "cpu", options)
    assert entry["results"] == {"flash-attn-res": {"status": "failed: no first call in 9 s"}}
    assert entry["copy"]["us"] == 1.0


def test_network_table_has_what_failed_and_what_was_timed() -> None:
    timed = {"us": 2000.0, "p20": 1900.0, "p80": 2100.0, "peak_gib": 1.5, "out error": 2e-3, "out floor": 1e-3}
    case = {
        "name": "network forward T1",
        "least_bytes": 10,
        "copy": {"us": 1.0},
        "results": {"ours-cute": timed, "liger": {"status": "failed: no"}},
    }
    text = network.to_markdown({"cases": [case]})
    assert "| ours-cute | 2.00 | 1.90 to 2.10 |" in text
    assert "1.50 | out 2.00e-03 / 1.00e-03 |" in text
    assert "| liger | failed: no |" in text


def test_network_suite_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert network.main([]) == 2
        assert "need a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="unknown provider nobody"):
        network.main(["--providers", "nobody"])


def test_profile_of_a_backward_has_two_kernels() -> None:
    """ncu's CSV, after what the profiled program and ncu itself print; a kernel's name follows that of its case."""
    numbers = {
        "gpu__time_duration.sum": ("ns", "1,500"),
        "dram__bytes_read.sum": ("Mbyte", "2.5"),
        "dram__bytes_write.sum": ("byte", "4,000"),
        "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "0.25"),
        "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "3"),
    }
    lines = ["==PROF== Connected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for kernel, case in enumerate(("direct forward T1", "direct backward T1", "direct backward T1")):
        lines += [f'"{kernel}","{case}/kernel","{name}","{unit}","{value}"' for name, (unit, value) in numbers.items()]
    kernels = profile.parse("\n".join(lines))
    assert [kernel["case"] for kernel in kernels] == ["direct forward T1", "direct backward T1", "direct backward T1"]
    assert kernels[0]["us"] == 1.5
    assert kernels[0]["read MB"] == 2.5
    assert kernels[0]["written MB"] == 0.0
    rows = profile.to_markdown({"metadata": {"device": "a device"}, "kernels": kernels}).splitlines()[-3:]
    names = ["direct forward T1", "direct backward T1, kernel 1 of 2", "direct backward T1, kernel 2 of 2"]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in names]
    assert all(row.endswith("| wait 3.0, barrier 0.2 |") for row in rows)


def test_profile_without_kernels_says_what_ncu_said() -> None:
    with pytest.raises(RuntimeError, match="saw no kernel of the CuTe backend: ==ERROR== no permission"):
        profile.parse("==ERROR== no permission")

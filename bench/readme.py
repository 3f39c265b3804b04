"""`python -m bench.readme`: the newest results into README.md, between the markers <!-- results --> and <!-- /results -->; and the
plot of storage formats from the accuracy report beside them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from bench import plots
from bench.results import Results, against_peers, markdown, notes, of_networks, to_markdown
from bench.timing import COPY_BYTES

BEGIN, END = "<!-- results -->", "<!-- /results -->"
_ROOT = Path(__file__).parent.parent


def between_markers(text: str, body: str) -> str:
    """`text` with what is between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs one {BEGIN} and, after it, one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{body.strip()}\n\n{END}{rest.split(END)[1]}"


def section(results: Results, networks: Results | None, folder: str) -> str:
    """Conditions, summary, plots and, folded, the headline tables; folder: of results and plots, relative to the README."""
    meta = results["metadata"]
    copies = [case["copy"]["us"] for case in results["cases"] if "copy" in case]
    bandwidth = COPY_BYTES / (sum(copies) / len(copies)) / 1e6 if copies else 0.0
    peers = ", ".join(
        f"{name} {version}"
        for name, version in meta["providers"].items()
        if version and name not in ("ours-cute", "ours-triton")
    )
    lines = [
        f"{meta['device']}, driver {meta['driver']}, torch {meta['torch']}, triton {meta['triton']}, CuTe DSL "
        f"{meta['nvidia-cutlass-dsl']}; {peers}. {meta['date'][:10]}, kernel sources {meta['kernel sources'][:12]}.",
        "bf16, medians. Share of copy bandwidth: the least bytes the operation must move / time / the bandwidth of a large copy "
        f"in the same rounds ({bandwidth:.2f} TB/s read and written). Bold: fastest of its row. All shapes, spreads and errors: "
        f"[{folder}]({folder}).",
        markdown(against_peers(results)),
        f"![Share of copy bandwidth]({folder}/shares.png)",
    ]
    if networks:
        sources = networks["metadata"]["kernel sources"][:12]
        lines.append(
            f"{markdown(of_networks(networks))}\n\n({networks['metadata']['device']}, kernel sources {sources})"
        )
    lines += [
        f"![Decode]({folder}/decode.png)",
        "<details><summary>Every headline shape, storage formats, workspace, host cost, first calls</summary>",
        to_markdown(results, headline_only=True).strip(),
        "</details>",
    ]
    missing = [f"- {note}" for note in notes(results)]
    return "\n\n".join(lines + (["\n".join(missing)] if missing else []))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--results", type=Path, help="a JSON of bench.run (default: the newest in bench/results)")
    parser.add_argument("--readme", type=Path, default=_ROOT / "README.md")
    options = parser.parse_args(arguments)
    found = sorted((_ROOT / "bench" / "results").glob("bench_*.json"), key=lambda path: path.stat().st_mtime)
    path = options.results or (found[-1] if found else None)
    if path is None or not path.is_file():
        print(
            f"no results{f' at {path}' if path else ''}: run `make bench` on a machine with a GPU first",
            file=sys.stderr,
        )
        return 2
    folder = os.path.relpath(path.parent.resolve(), options.readme.parent.resolve())
    networks = path.with_name(path.name.replace("bench_", "network_"))
    body = section(
        json.loads(path.read_text()), json.loads(networks.read_text()) if networks.is_file() else None, folder
    )
    options.readme.write_text(between_markers(options.readme.read_text(), body))
    report = path.with_name(path.name.replace("bench_", "report_"))
    if report.is_file():
        plots.write_storage(json.loads(report.read_text()), path.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())

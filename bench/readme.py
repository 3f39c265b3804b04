"""`python -m bench.readme`: the results into README.md, between the markers <!-- results --> and <!-- /results -->.

The newest first, with their plots; and that of storage formats from the accuracy report beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from attnres.report import source_digest
from bench import plots
from bench.results import Results, against_peers, beside, groups, is_decode, markdown, notes, of_networks, to_markdown
from bench.timing import COPY_BYTES

BEGIN, END = "<!-- results -->", "<!-- /results -->"
_ROOT = Path(__file__).parent.parent


def between_markers(text: str, body: str) -> str:
    """`text` with what is between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs one {BEGIN} and, after it, one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{body.strip()}\n\n{END}{rest.split(END)[1]}"


def section(results: Results, path: Path, folder: str) -> str:
    """One run: conditions, summary, plots and, folded, the headline tables.

    path: of the results; folder: theirs, relative to the README.
    """
    meta, networks = results["metadata"], beside(path, "network")
    copies = [case["copy"]["us"] for case in results["cases"] if "copy" in case]
    bandwidth = COPY_BYTES / (sum(copies) / len(copies)) / 1e6 if copies else 0.0
    timed = {name for case in results["cases"] for name, found in case["results"].items() if "us" in found}
    peers = ", ".join(
        f"{name} {version}"
        for name, version in meta["providers"].items()
        if version and name in timed and not name.startswith("ours")
    )
    lines = [
        f"### {meta['device']}",
        f"driver {meta['driver']}, torch {meta['torch']}, triton {meta['triton']}, CuTe DSL {meta['nvidia-cutlass-dsl']}"
        f"{'; ' if peers else ''}{peers}. {meta['date'][:10]}, {_sources(meta)}.",
        "bf16, medians. Share of copy bandwidth: the least bytes the operation must move / time / the bandwidth of a large copy "
        f"in the same rounds ({bandwidth:.2f} TB/s read and written). Bold: fastest of its row. All shapes, spreads and errors: "
        f"[{path.stem}.md]({folder}/{path.stem}.md).",
    ]
    summary = against_peers(results)
    lines += [markdown(summary)] if summary.rows else []
    lines.append(f"![Share of copy bandwidth]({folder}/{beside(path, 'shares').stem}.png)")
    if networks.is_file():
        found = json.loads(networks.read_text())
        lines.append(
            f"{markdown(of_networks(found))}\n\n({found['metadata']['device']}, {_sources(found['metadata'])})"
        )
    if any(is_decode(group) for group in groups(results)):
        lines.append(f"![Decode]({folder}/{beside(path, 'decode').stem}.png)")
    lines += [
        "<details><summary>Every headline shape, storage formats, workspace, host cost, first calls</summary>",
        to_markdown(results, headline_only=True).strip(),
        "</details>",
    ]
    missing = [f"- {note}" for note in notes(results)]
    return "\n\n".join(lines + (["\n".join(missing)] if missing else []))


def _sources(metadata: dict[str, Any]) -> str:
    """The digest of what was measured."""
    digest = metadata["kernel sources"]
    return f"{'these sources' if digest == source_digest() else 'earlier sources'} ({digest[:12]})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--results", type=Path, default=_ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--readme", type=Path, default=_ROOT / "README.md")
    options = parser.parse_args(arguments)
    found = {path: json.loads(path.read_text()) for path in options.results.glob("bench_*.json")}
    if not found:
        print(
            f"no results in {options.results}: run `make bench` on a machine with a GPU first",
            file=sys.stderr,
        )
        return 2
    folder = os.path.relpath(options.results.resolve(), options.readme.parent.resolve())
    newest_first = sorted(found, key=lambda path: found[path]["metadata"]["date"], reverse=True)
    body = "\n\n".join(section(found[path], path, folder) for path in newest_first)
    options.readme.write_text(between_markers(options.readme.read_text(), body))
    for path, results in found.items():
        plots.write(results, path)
    reports = [path for path in (beside(path, "report") for path in newest_first) if path.is_file()]
    if reports:
        plots.write_storage(json.loads(reports[0].read_text()), options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

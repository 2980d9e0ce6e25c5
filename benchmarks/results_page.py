"""Put the tables of the benchmarks into the documents, from ``benchmarks/logs``.

A document holds ``<!-- results:NAME -->`` ... ``<!-- end -->``; what is between is replaced by the table of the records
in ``benchmarks/logs/NAME.json``. Between ``<!-- log:NAME -->`` and the end go the lines of
``benchmarks/logs/NAME.txt``, with ``<!-- log:NAME A-B -->`` those numbered A to B. Where there is no such log yet, the
document stays as it is:

    python benchmarks/results_page.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "benchmarks" / "logs"
PAGES = tuple(page.stem for page in sorted((ROOT / "docs").glob("*.md")))
DOCUMENTS = ("README.md", "README.zh-CN.md", *(f"docs/{page}.md" for page in PAGES))
HEADS = {
    "en": ("network", "test accuracy", "bits per byte", "vs fp32", "step", "saved for backward", "gradient bits"),
    "zh": ("网络", "测试准确率", "每字节比特数", "与 fp32 之差", "单步时间", "为反向传播保存", "梯度位数"),
}


def table(records: list[dict[str, Any]], language: str) -> str:
    """Return the Markdown table of one comparison."""
    text = "bits_per_byte" in records[0]
    metric = "bits_per_byte" if text else "test_accuracy"
    head = HEADS[language]
    columns = [head[0], head[2] if text else head[1], *head[3:]]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        label = record["recipe"] + "".join(f" {k}={v}" for k, v in record.get("overrides", {}).items())
        groups.setdefault(label, []).append(record)
    base = next(iter(groups.values()))
    base_mean = statistics.mean(r[metric] for r in base)
    for label, group in groups.items():
        values = [r[metric] for r in group]
        mean = statistics.mean(values)
        spread = f" ± {statistics.stdev(values) * (1 if text else 100):.2f}" if len(values) > 1 else ""
        quality = f"{mean:.3f}{spread}" if text else f"{100 * mean:.2f}{spread} %"
        difference = f"{100 * (mean / base_mean - 1):+.1f} %" if text else f"{100 * (mean - base_mean):+.2f}"
        step = statistics.median(r["step_ms_median"] for r in group)
        ratio = step / statistics.median(r["step_ms_median"] for r in base)
        saved = group[0]["saved_bytes"] / 1e6
        bits = group[0]["gradient_bits"]
        row = (label, quality, difference, f"{step:.1f} ms ({ratio:.2f}×)", f"{saved:.2f} MB", f"{bits:.3g}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def lines(text: str, part: str | None) -> str:
    """Return a log as a block of text: all of it, or the lines A to B of ``"A-B"``."""
    chosen = text.rstrip().splitlines()
    if part:
        first, last = (int(number) for number in part.split("-"))
        chosen = chosen[first - 1 : last]
    return "\n".join(["```", *chosen, "```"])


def filled(text: str, language: str, logs: Path = LOGS) -> str:
    """Return a document with every table and log that there is."""

    def fill(match: re.Match[str]) -> str:
        kind, name, part, old = match.groups()
        path = logs / (f"{name}.json" if kind == "results" else f"{name}.txt")
        body = old.strip()
        if path.exists():
            body = table(json.loads(path.read_text()), language) if kind == "results" else lines(path.read_text(), part)
        return f"<!-- {kind}:{name}{' ' + part if part else ''} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- (results|log):([\w.-]+)(?: (\d+-\d+))? -->(.*?)<!-- end -->", fill, text, flags=re.S)


def main() -> None:
    """Fill every document."""
    for name in DOCUMENTS:
        path = ROOT / name
        if path.exists():
            path.write_text(filled(path.read_text(), "zh" if "zh" in name else "en"))


if __name__ == "__main__":
    main()

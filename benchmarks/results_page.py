"""Put the tables of the training benchmarks into the documents, from the records in ``benchmarks/logs``.

A document holds ``<!-- results:NAME -->`` ... ``<!-- end -->``; what is between is replaced by the table of
``benchmarks/logs/NAME.json``:

    python benchmarks/results_page.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "README.zh-CN.md", "docs/results.md")
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


def main() -> None:
    """Fill every document."""
    for name in DOCUMENTS:
        path = ROOT / name
        language = "zh" if "zh" in name else "en"

        def fill(match: re.Match[str], language: str = language) -> str:
            log = ROOT / "benchmarks" / "logs" / f"{match[1]}.json"
            body = table(json.loads(log.read_text()), language) if log.exists() else match[2].strip()
            return f"<!-- results:{match[1]} -->\n{body}\n<!-- end -->"

        text = re.sub(r"<!-- results:(\w+) -->(.*?)<!-- end -->", fill, path.read_text(), flags=re.S)
        path.write_text(text)


if __name__ == "__main__":
    main()

"""The table of benchmarks/accelerator.py: a row a measurement, or the reason why there is none."""

from typing import Any, TypeAlias

Entry: TypeAlias = dict[str, Any]


def table(found: Entry, beside: dict[str, tuple[str, ...]]) -> str:
    """The results as a table in Markdown: of each row of ``beside``, with the rows that it is compared with."""
    about, rows = found["conditions"], found["rows"]
    names = ("jax", "torch", "driver", "commit")
    facts = ", ".join(f"{name} {about[name]}" for name in names if about.get(name))
    toy = "; toy sizes, whose figures say nothing" if about["toy"] else ""
    lines = [
        f"{about['device']}, {about['cpu_cores']} CPU cores, {facts}{toy}. Medians; shapes are in the JSON file.",
        "",
        "| | tokens/s | time | of what the device can | memory | beside |",
        "|---|---|---|---|---|---|",
    ]
    for row, others in beside.items():
        entry = rows.get(row, {"status": "missing", "reason": "not tried yet"})
        lines.append(f"| {row} | " + " | ".join([*cells(entry), compared(entry, others, rows)]) + " |")
    return "\n".join(lines) + "\n"


def cells(entry: Entry) -> list[str]:
    """Rate, time, share and memory of a row, as text; the reason where it was not measured."""
    if entry["status"] != "measured":
        reason = entry["reason"].replace("|", "\\|")
        return [f"{entry['status']}: {reason}", "", "", ""]
    if entry["benchmark"] == "decode":
        share = f"{entry['bandwidth_ratio']:.0%} of {entry['bandwidth_measured'] / 1e12:.3g} TB/s, by {entry['bandwidth_measured_by']}"
        times = f"a step {1e3 * entry['batch'] / rate(entry):.4g} ms, the first token {1e3 * entry['first_token_seconds']:.3g} ms"
        return [f"{rate(entry):,.0f}", times, share, ""]
    mfu = f"{next(iter(entry['mfu'].values())):.1%} MFU" if "mfu" in entry else ""
    peak = next(iter(entry["memory_bytes"].values()))
    return [
        f"{rate(entry):,.0f}", f"a step {1e3 * entry['step_seconds']:.4g} ms", mfu, f"{peak / 2**30:.1f} GiB" if peak else "",
    ]  # fmt: skip


def compared(entry: Entry, beside: tuple[str, ...], rows: dict[str, Entry]) -> str:
    """How many times the rate of the fastest row of ``beside`` an entry has, or "" without both."""
    others = {row: rate(rows[row]) for row in beside if rows.get(row, {}).get("status") == "measured"}
    if entry["status"] != "measured" or not others:
        return ""
    best = max(others, key=lambda row: others[row])
    return f"{rate(entry) / others[best]:.2f} times {best}"


def rate(entry: Entry) -> float:
    """Tokens a second of an entry that was measured."""
    value = (
        entry["decode_tokens_per_second"]
        if entry["benchmark"] == "decode"
        else next(iter(entry["tokens_per_second"].values()))
    )
    return float(value)

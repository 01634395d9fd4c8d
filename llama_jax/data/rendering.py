"""A report about a corpus as text, and its lengths as a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_jax.cli.progress import bytes_text
from llama_jax.data.report import Document, Report
from llama_jax.storage.files import replacing

# The text names so many scripts.
SCRIPTS = 8
# An excerpt has so many characters in the text.
SHORT = 80
# The longest bar of the histogram, in characters.
BAR = 40
COMMON = "Common"


def text_of(report: Report) -> str:
    """Return the report as lines of text, without its notes and warnings."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    if report.documents is None:
        yield "documents   unknown: the ids have no BOS of the tokenizer"
    else:
        about = "about " if report.duplicates_estimated else ""
        copies = f"{about}{report.duplicates:,} exact copies of others" if report.duplicates else "no exact copies"
        files = f" in {report.files:,} file{'s' * (report.files != 1)}" if report.files else ""
        yield f"documents   {report.documents:,}{files}, {copies}"
    if report.bytes is None:
        yield "text        of unknown size"
    else:
        characters = "" if report.characters is None else f", {report.characters:,} characters"
        yield f"text        {report.bytes:,} bytes ({bytes_text(report.bytes)}){characters}"
    if report.tokens is not None:
        rate = "" if report.bytes_per_token is None else f", {report.bytes_per_token:.2f} bytes a token"
        yield f"tokens      {report.tokens:,} with BOS and EOS{rate}"
        yield (
            f"            {_percent(report.unknown_share)} unknown, {_percent(report.byte_share)} single bytes; "
            f"{report.used_tokens:,} of the {report.vocab_size:,} in the vocabulary occur"
        )
    if report.scripts is not None:
        yield f"scripts     {_scripts(report.scripts)}"
    if report.documents is None:
        return
    yield f"lengths     median {report.median:,} {report.length_unit}, longest {report.longest:,}"
    yield from _histogram(report)
    yield from _documents("longest documents", report.longest_documents, report.length_unit)
    yield from _documents(f"random documents (seed {report.seed})", report.random_documents, report.length_unit)


def _percent(share: float | None) -> str:
    """Return a share in percent. A share above 0 is never shown as 0%."""
    return "0%" if not share else f"{share:.2%}" if share >= 0.0001 else "less than 0.01%"


def _scripts(scripts: dict[str, float]) -> str:
    shown = [f"{name} {_percent(part)}" for name, part in list(scripts.items())[:SCRIPTS]]
    rest = f", and {len(scripts) - SCRIPTS:,} others" if len(scripts) > SCRIPTS else ""
    common = f" ({COMMON}: spaces, digits and signs)" if COMMON in list(scripts)[:SCRIPTS] else ""
    return ", ".join(shown) + rest + common


def _histogram(report: Report) -> Iterator[str]:
    most = max((each["documents"] for each in report.histogram), default=1)
    width = len(f"{report.longest:,}") + 1
    for each in report.histogram:
        bar = "#" * -(-BAR * each["documents"] // most)
        yield f"  {each['from']:>{width},} to {each['to']:>{width},}  {bar:<{BAR}} {each['documents']:,}"


def _documents(title: str, documents: Sequence[Document], unit: str) -> Iterator[str]:
    yield ""
    yield title
    for each in documents:
        yield f"  {each.length:,} {unit}  {each.file}, {each.word} {each.record:,}: {each.excerpt[:SHORT]}"


def draw_lengths(path: Path, report: Report) -> None:
    """Draw the histogram of the lengths of documents into a PNG file."""
    # Imported here, because matplotlib is slow to import and pictures are rare.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    lows = [max(0.5, each["from"]) for each in report.histogram]
    widths = [each["to"] + 1 - low for each, low in zip(report.histogram, lows, strict=True)]
    counts = [each["documents"] for each in report.histogram]
    axes.bar(lows, counts, widths, align="edge", color="tab:blue", edgecolor="white")
    axes.set_xscale("log", base=2)
    axes.set(xlabel=f"length of a document, {report.length_unit} (log scale)", ylabel="documents")
    title = f"{report.source}: {report.documents or 0:,} documents"
    axes.set_title(ascii(title)[1:-1], parse_math=False)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.25, axis="y")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)

"""Tyro: the panels in which it prints errors of a command line."""

import re

# Patterns of tyro's messages, each with a replacement in the form of this project's messages.
FLAG_ERRORS = (
    (r"Error parsing (\S+): .*?('.*'|\[.*\]).*", r"\1: expected {kind}, found \2"),
    (r"invalid choice ('.*') for argument '(\S+)'\. Expected one of \((.*?)\).*", r"\2: expected one of \3, found \1"),
    (r"Missing value for argument '(\S+)'.*", r"\1: expected a value, found none"),
    (r"Unrecognized options: (-\S*?),?( .*)?", r"\1: expected a flag of this command, found another"),
    (r"Unrecognized options: (\S+?),?( .*)?", r"\1: expected a flag before it, found none that takes it"),
)
KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "{None}|INT": "a whole number or None",
    "{None}|FLOAT": "a number or None",
}


def one_line(panel: str) -> str:
    """Return the message of the panel that tyro prints on an error, and the flag that it proposes, in one line."""
    lines = [line.strip("╭╮╰╯│─ ") for line in panel.splitlines()]
    # Where the terminal has ASCII alone, lines of hyphens stand for the frame.
    lines = ["" if set(line) == {"-"} else line for line in lines]
    parts: list[list[str]] = [[]]
    for line in lines[1:]:
        parts.append([]) if not line else parts[-1].append(line)
    parts = list(filter(None, parts)) or [list(filter(None, lines))]
    message = " ".join(parts[0])
    # The second line of a hint is the flag with the kind of its value.
    flags = {part[0].split(":")[0]: part[1] for part in parts[1:] if len(part) > 1}
    kind = flags.get("Argument helptext", "").partition(" ")[2]
    for pattern, words in FLAG_ERRORS:
        if match := re.fullmatch(pattern, message):
            message = match.expand(words).replace("{kind}", KINDS.get(kind, kind))
            break
    proposed = next((flag for title, flag in flags.items() if title.startswith("Perhaps you meant")), "")
    return message + (f"; perhaps you meant {proposed.split(' ')[0].rstrip(',')}" if proposed else "")

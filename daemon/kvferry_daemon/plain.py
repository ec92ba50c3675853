"""Words of strangers, made harmless: ids, reasons and addresses come from everywhere."""


def plain(text: str) -> str:
    """No line breaks, and nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

"""Short names, times and sizes for readers of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def short_names(domains: Mapping[str, str | None]) -> dict[str, str]:
    """Shorten task names: "qs_math_add" is "add" if all tasks of its domain begin with "qs_math_".

    ``domains`` maps each task to its domain. Every task keeps at least one word.
    """
    short = {}
    for task, domain in domains.items():
        group = [other for other, of in domains.items() if of == domain]
        words = task.split("_")
        shared = _shared_words(words, group) if len(group) > 1 else 0
        short[task] = "_".join(words[shared:])
    return short


def _shared_words(words: Sequence[str], tasks: Sequence[str]) -> int:
    """Return with how many of ``words`` all tasks begin; the last word is never among them."""
    for count in range(len(words) - 1, 0, -1):
        beginning = "_".join(words[:count]) + "_"
        if all(task.startswith(beginning) for task in tasks):
            return count
    return 0


def duration(seconds: float) -> str:
    """Write seconds for a reader: 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def byte_size(count: int | None) -> str:
    """Write bytes for a reader: 74 KB, 135.3 MB; a dash where they are not known."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def context_length(count: int) -> str:
    """Write a context's length for an axis of doublings: 512, 1k, 32k; 1k is 1024."""
    return f"{count / 1024:g}k" if count >= 1024 else str(count)


def token_count(count: int | None) -> str:
    """Write a number of tokens for a reader: 950, 4.1 K, 655.4 M, 20.0 B; a dash for None."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("", " K", " M"):
        if size < 1000:
            return f"{size:.0f}" if not unit else f"{size:.1f}{unit}"
        size /= 1000
    return f"{size:.1f} B"

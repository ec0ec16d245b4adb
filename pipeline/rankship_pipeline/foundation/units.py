"""Formats stored numbers for people; the only place that does."""

_MEGABYTE = 1_000_000
_GIGABYTE = 1_000_000_000
_TEN_MS = 10_000_000  # nanoseconds
_FEW_SECONDS = 9.95
_MINUTE = 60  # seconds; also minutes in an hour


def show_bytes(value: int) -> str:
    """Bytes in kB (1000 bytes) below 1 MB, MB below 1 GB, else GB."""
    if value < _MEGABYTE:
        return f"{value / 1e3:,.1f} kB"
    return f"{value / 1e6:,.2f} MB" if value < _GIGABYTE else f"{value / 1e9:,.1f} GB"


def show_ns(value: float) -> str:
    """Nanoseconds as µs below 10 ms, else ms."""
    return f"{value / 1e3:,.1f} µs" if value < _TEN_MS else f"{value / 1e6:,.2f} ms"


def show_count(value: int) -> str:
    """A count with thousands separators."""
    return f"{value:,}"


def show_percent(share: float, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage."""
    return f"{100 * share:.{digits}f} %"


def show_celsius(value_mc: int) -> str:
    """Millidegrees as °C."""
    return f"{value_mc / 1000:.1f} °C"


def show_seconds(value: float) -> str:
    """Seconds, with one digit below ten, else minutes, else hours and minutes."""
    if round(value) < _MINUTE:
        return f"{value:.1f} s" if value < _FEW_SECONDS else f"{value:.0f} s"
    minutes = round(value / _MINUTE)
    return f"{minutes} min" if minutes < _MINUTE else f"{minutes // _MINUTE} h {minutes % _MINUTE} min"

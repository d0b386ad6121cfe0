"""Exact windows (t - W, t] over event time, in milliseconds."""

from typing import Final

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000

H1, H24, D7, D14, D30, D60, D90, LIFE = range(8)
"""Window indices. 14 d and 60 d exist to subtract: they give the period before 7 d and 30 d. LIFE never evicts."""

WINDOW_NAMES: Final = ("1h", "24h", "7d", "14d", "30d", "60d", "90d", "life")
WINDOW_MS: Final = (HOUR_MS, DAY_MS, 7 * DAY_MS, 14 * DAY_MS, 30 * DAY_MS, 60 * DAY_MS, 90 * DAY_MS)
"""Lengths of the bounded windows; LIFE has none."""
WINDOW_DAYS: Final = (1 / 24, 1.0, 7.0, 14.0, 30.0, 60.0, 90.0)
N_WINDOWS: Final = 8
HORIZON_MS: Final = 90 * DAY_MS
"""Facts with event_time > newest - HORIZON_MS are kept; also the grace for late facts."""

"""Seconds of a command, as JSON: `python -m bench.timed make demo`. Fails when the command does."""

from __future__ import annotations

import json
import subprocess
import sys
import time

if __name__ == "__main__":
    begin = time.monotonic()
    code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=False).returncode
    seconds = round(time.monotonic() - begin, 1)
    # The same figure under the names that the long measurements of bench/fresh.py use.
    print(json.dumps({"seconds": seconds, "seconds_again": seconds, "seconds_from_nothing": seconds}))
    sys.exit(code)

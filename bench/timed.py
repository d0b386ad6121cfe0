"""Seconds of a command, as JSON: `python -m bench.timed make demo`. Fails when the command does."""

from __future__ import annotations

import json
import subprocess
import sys
import time

if __name__ == "__main__":
    begin = time.monotonic()
    code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=False).returncode
    print(json.dumps({"seconds": round(time.monotonic() - begin, 1)}))
    sys.exit(code)

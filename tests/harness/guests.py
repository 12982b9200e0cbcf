"""What guests of QEMU and of User-mode Linux have in common: this checkout, and how they fail."""

import os
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON_PATH = os.pathsep.join(str(ROOT / folder) for folder in ("backends", "daemon", "."))
# For a guest's shell: it runs this checkout, whatever its .venv has been made from.
EXPORT_PYTHON_PATH = f"export PYTHONPATH={shlex.quote(PYTHON_PATH)}"


class GuestFailed(AssertionError):
    """The script failed in the guest, or the guest did not finish."""

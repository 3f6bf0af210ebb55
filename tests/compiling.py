"""Programs of their own in which Triton compiles kernels, whatever the tests themselves run on."""

import json
import os
import subprocess
import sys
from typing import Any


def output_of(program: str, *arguments: str, **variables: str) -> Any:
    """What ``program`` prints, read as JSON; tests' modules can be imported there, :mod:`stub_gpu` first of all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)

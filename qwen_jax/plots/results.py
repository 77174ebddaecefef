"""Where the measured results lie: in a clone under `benchmarks/results`, in an installed package beside this file."""

import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def read_results(name: str) -> dict[str, Any]:
    """The content of `benchmarks/results/{name}.json`.

    Raises:
        FileNotFoundError: there is no such file; says where it was looked for.
    """
    places = [_HERE / "measured", _HERE.parents[1] / "benchmarks" / "results"]
    for place in places:
        if (file := place / f"{name}.json").is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"{name}.json: in none of {[str(place) for place in places]}; install the project again.")

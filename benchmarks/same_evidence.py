"""Whether two runs are the same run: every logged loss and every measurement, to the last bit.

The proof of a change that must change nothing. Run a recipe before and after it (``beholder run CONFIG --smoke`` says
where its run folder is), then

    python benchmarks/same_evidence.py outputs/smoke_before/run outputs/smoke_after/run

Left out is what two runs of one program differ in too: times, memory, where files lie, when it was. Exit code 1 when
anything else differs; what differs is named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OF_THE_MOMENT = {"created", "cost", "provenance", "config_yaml", "run_name", "summary"}
"""Of ``evidence.json``."""
OF_THE_CLOCK = ("_s", "per_s", "_share", "_mb")
"""How the names of the columns of ``metrics.jsonl`` end that are times, rates and memory."""


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    match value:
        case dict():
            for key, item in value.items():
                yield from leaves(item, f"{name}.{key}" if name else str(key))
        case list():
            for k, item in enumerate(value):
                # by its name where it has one: a measurement more moves those behind it
                own = item.get("name") if isinstance(item, dict) else None
                place = k if own is None else "/".join(str(item[f]) for f in ("name", "by", "stratum") if item.get(f))
                yield from leaves(item, f"{name}[{place}]")
        case _:
            yield name, value


def facts(run: Path) -> dict[str, Any]:
    evidence = json.loads((run / "evidence.json").read_bytes())
    found = dict(leaves({k: v for k, v in evidence.items() if k not in OF_THE_MOMENT}, "evidence"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.endswith(OF_THE_CLOCK)} for line in lines]
    return found | dict(leaves(kept, "metrics"))


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    first, second = (facts(Path(run)) for run in sys.argv[1:])
    names = dict.fromkeys((*first, *second))
    other = [n for n in names if n not in first or n not in second or first[n] != second[n]]
    for name in other[:20]:
        print(f"{name}: {first.get(name, 'absent')!r} → {second.get(name, 'absent')!r}")
    print(f"{len(names)} values compared, {len(other)} differ")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())

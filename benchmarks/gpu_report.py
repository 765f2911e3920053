"""The report of benchmarks/gpu.py in Markdown, from what its parts have found."""

from collections.abc import Iterator, Sequence
from typing import Any

#: What a training step moves and computes on an H100, for the reference network at 224 x 224: docs/engines/gpu.md.
ROOFLINE = {"tf32": 1178, "bf16": 2306}


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One section a part. A part or a measurement that failed says so in one line."""
    lines = ["# minunet on a GPU", "", "Written by `python benchmarks/gpu.py`. A ratio above 1: minunet is faster."]
    machine = next((part["machine"] for part in results.values() if "machine" in part), None)
    if machine is not None:
        dates = sorted({part["date"] for part in results.values() if "date" in part})
        lines += ["", *table(("what", "which"), [*machine.items(), ("date", ", ".join(dates))])]
    for name, part in results.items():
        lines += ["", f"## {name.capitalize()}", ""]
        if "error" in part:
            lines += [f"**Not complete:** {part['error']}", ""]
        found = {key: value for key, value in part.items() if key not in ("machine", "date", "error", "seconds")}
        lines += list(SECTIONS[name](found)) if found else ["Nothing was measured."]
    return "\n".join(lines) + "\n"


def correctness(found: dict[str, Any]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = []
    for name, entry in found.items():
        if name == "tests":
            continue
        if "error" in entry:
            rows.append((name, entry["error"], "", "", "", ""))
            continue
        error, bound = (f"{entry[key]:.1e}" for key in ("gradients", "bound"))
        bits = "yes" if entry["same bits twice"] else "**no**"
        verdict = "passed" if entry["passed"] else "**failed**"
        rows.append((name, entry["engine"], error, bound, bits, verdict))
    yield from table(("", "engine", "gradients from float64", "bound", "same bits twice", ""), rows)
    if tests := found.get("tests"):
        yield ""
        yield f"Tests: {'passed' if tests['passed'] else '**failed**'} ({tests['summary']})"
        yield from (f"- `{line}`" for line in tests["failed"])


def sizes(found: dict[str, Any]) -> Iterator[str]:
    yield f"Batch {found['batch']}. The distance from the truth, over its length."
    yield ""
    rows = [
        (
            name,
            ", ".join(f"{what} {distance:.1e}" for what, distance in entry["distances"].items()),
            "passed" if entry["passed"] else "**failed**",
        )
        if isinstance(entry, dict) and "error" not in entry
        else (name, str(entry), "")
        for name, entry in found.items()
        if name != "batch"
    ]
    yield from table(("what", "distance", ""), rows)


def ceilings(found: dict[str, Any]) -> Iterator[str]:
    yield from table(("ceiling", ""), [(name, f"{value:.3g}") for name, value in found.items()])


def layers(found: dict[str, Any]) -> Iterator[str]:
    yield f"Batch {found['batch']}. TFLOP/s of minunet and, in brackets, the ratio to PyTorch channels last."
    yield ""
    passes = ("forward", "grad-input", "grad-weight")
    rows: list[tuple[str, ...]] = []
    for name, entry in found.items():
        if name == "batch":
            continue
        if "error" in entry:
            rows.append((name, entry["error"], "", ""))
        else:
            rows.append((name, *(_layer(entry[one]) for one in passes)))
    yield from table(("layer", *passes), rows)


def _layer(entry: dict[str, Any]) -> str:
    others = [f"{name} {rate:.3g}" for name, rate in entry.items() if name not in ("PyTorch", "ratio")]
    return ", ".join(others) + (f" ({entry['ratio'][0]:.2f})" if "ratio" in entry else "")


def step(found: dict[str, Any]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = []
    for case, entry in found.items():
        if not isinstance(entry, dict):
            continue
        if "error" in entry:
            rows.append((case, entry["error"], "", "", "", "", ""))
            continue
        for peer, figures in entry.items():
            share = ROOFLINE.get(case.partition(",")[0])
            ratio = figures.get("ratio")
            rows.append(
                (
                    case,
                    peer,
                    f"{figures['ms']:.1f}",
                    f"{figures['images/s']:.0f}" + (f" ({figures['images/s'] / share:.0%})" if share else ""),
                    f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else "",
                    f"{figures['GB']:.2f}",
                    f"{figures['memory ratio']:.2f}" if ratio else "",
                )
            )
    header = ("case", "", "ms a step", "images/s (of the roofline)", "ratio", "peak GB", "minunet's memory over it")
    yield from table(header, rows)
    yield from (f"\n{name}: {value}" for name, value in found.items() if not isinstance(value, dict))


def profile(found: dict[str, Any]) -> Iterator[str]:
    ceiling = ", ".join(f"{name} {value:.3g}" for name, value in found.get("ceilings", {}).items())
    yield f"Batch {found['batch']}. Floor: the longer of arithmetic and bytes at the ceilings ({ceiling})."
    for precision, entry in found.items():
        if precision in ("batch", "ceilings"):
            continue
        yield ""
        if "error" in entry:
            yield f"{precision}: {entry['error']}"
            continue
        yield f"{precision}: a step of {entry['step, ms']:.2f} ms; the kernels take {entry['calls, ms']:.2f} ms of it."
        yield ""
        for kinds in ({k: v for k, v in entry["kinds"].items() if ("pixels" in k) == by_level} for by_level in (0, 1)):
            rows = [
                (kind, f"{one['calls']:.0f}", f"{one['ms']:.2f}", f"{one['floor']:.2f}")
                for kind, one in sorted(kinds.items(), key=lambda item: -item[1]["ms"])[:24]
            ]
            yield from ("", *table(("kernel", "calls", "ms", "floor, ms"), rows))


def reference(found: dict[str, Any]) -> Iterator[str]:
    rows = [(name, f"{value:.3g}" if isinstance(value, float) else f"`{value}`") for name, value in found.items()
            if name not in ("history", "test")]  # fmt: skip
    yield from table(("what", ""), rows)
    if dice := found.get("test"):
        yield ""
        yield f"Dice per test patient, 3-D: mean {dice['mean']:.3f}, median {dice['median']:.3f}."
    if history := found.get("history"):
        yield ""
        yield from ["```", *history, "```"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]


SECTIONS = {
    "correctness": correctness,
    "sizes": sizes,
    "ceilings": ceilings,
    "layers": layers,
    "step": step,
    "profile": profile,
    "reference": reference,
}

"""Registers, spills and instructions of every CUDA kernel, as the compiler reports them: no GPU needed.

python benchmarks/cuda_resources.py        # CSV under benchmarks/results; fails where a kernel spills
"""

import argparse
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s", re.M)
ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
#: What CMakeLists.txt has compiled once, for the oldest architecture, and assembled for each.
_LISTED = re.search(r"fastlip_cuda_portable OBJECT([^)]*)", (ROOT / "CMakeLists.txt").read_text())
ONCE = re.findall(r"(\w+)\.cu", _LISTED[1]) if _LISTED else []
OLDEST = "sm_80"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def disassembler() -> str | None:
    """Return cuobjdump, which also comes with Triton."""
    triton = importlib.util.find_spec("triton")
    places = [str(Path(triton.origin).parent / "backends/nvidia/bin")] if triton and triton.origin else []
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(places))


def plain(name: str) -> str:
    name = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    return re.sub(r"fastlip::|cuda::|\(anonymous namespace\)::|^void ", "", name.split(">(")[0].strip() + ">")


def report(source: Path, architecture: str, nvcc: str) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        front = (OLDEST if source.stem in ONCE else architecture).replace("sm", "compute")
        command = [nvcc, "-std=c++17", f"-gencode=arch={front},code={architecture}", "--expt-relaxed-constexpr"]
        command += [f"-I{SOURCES}"]
        command += ["-Xptxas", "-v", "-c", str(source), "-o", f"{folder}/out.o"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        sass = ""
        if (tool := disassembler()) is not None:
            sass = subprocess.run([tool, "-sass", f"{folder}/out.o"], check=True, capture_output=True, text=True).stdout
    parts = [part.split("\n", 1) for part in sass.split("Function : ")[1:]]
    counts = {plain(name.strip()): len(INSTRUCTION.findall(body)) for name, body in parts}
    rows: list[dict[str, str]] = []
    for line in text.splitlines():
        if found := ENTRY.search(line):
            name = plain(found[1])
            rows.append({"source": source.stem, "architecture": found[2], "kernel": name})
            rows[-1]["instructions"] = str(counts.get(name, ""))
        elif (found := SPILLS.search(line)) and rows:
            rows[-1] |= {"stack_bytes": found[1], "spill_store_bytes": found[2], "spill_load_bytes": found[3]}
        elif (found := USED.search(line)) and rows:
            rows[-1] |= {"registers": found[1], "static_shared_bytes": found[2] or "0"}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/cuda_resources.csv")
    args = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc was not found; install the CUDA toolkit and put it on PATH")
    sources = sorted((SOURCES / "kernels/cuda").glob("*.cu"))
    rows = [row for a in args.architectures for source in sources for row in report(source, a, nvcc)]
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"V([\d.]+)", version)
    rows = [row | {"nvcc": release[1] if release else ""} for row in rows]
    with args.out.open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    spilling = [row for row in rows if row["spill_store_bytes"] != "0"]
    most = max(int(row["registers"]) for row in rows)
    print(f"{len(rows)} kernels, {len(spilling)} of them spill, at most {most} registers")
    for row in spilling:
        print(f"{row['architecture']} {row['kernel']}: {row['spill_store_bytes']} bytes")
    sys.exit(bool(spilling))


if __name__ == "__main__":
    main()

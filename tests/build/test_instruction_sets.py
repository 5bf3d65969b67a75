"""Units of several instruction sets share no function: the linker might keep one with instructions that a CPU lacks.

Compiled without optimisation, where every function that is not inlined for sure is there.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted(path.stem for path in (ROOT / "csrc/kernels/cpu").glob("*.inl"))
TOOLS = shutil.which("g++"), shutil.which("nm")
#: Compilers' options, by which code is chosen.
OPTIONS = [[], ["-mavx2", "-mfma"], ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]]
OPTIONS = OPTIONS if platform.machine() in ("x86_64", "AMD64") else OPTIONS[:1]
#: What the compiler shares between units itself.
_OWN = re.compile(r"DW\.ref\.|__clang_call_terminate")


def symbols_not_of(isa, folder, source, chosen=()):
    """Symbols other units could see, but for those with the name of the instruction set in theirs."""
    unit = folder / "unit.cpp"
    unit.write_text(source)
    options = ["-std=c++20", "-O0", "-w", f"-DFASTLIP_ISA={isa}", f"-I{ROOT / 'csrc'}", *chosen]
    subprocess.run([TOOLS[0], *options, "-c", unit, "-o", folder / "unit.o"], check=True)
    listed = subprocess.run([TOOLS[1], "-C", "--defined-only", folder / "unit.o"], capture_output=True, text=True)
    symbols = re.findall(r"^[0-9a-f]+ [WVuTDBRC] (.*)$", listed.stdout, re.M)
    return [s for s in symbols if isa not in s and not _OWN.search(s)]


@pytest.mark.skipif(None in TOOLS, reason="needs g++ and nm")
@pytest.mark.parametrize("chosen", OPTIONS, ids=lambda chosen: chosen[0] if chosen else "baseline")
@pytest.mark.parametrize("unit", UNITS)
def test_units_share_no_function(tmp_path, unit, chosen):
    assert symbols_not_of("some_isa", tmp_path, f'#include "kernels/cpu/{unit}.inl"\n', chosen) == []


@pytest.mark.skipif(None in TOOLS, reason="needs g++ and nm")
def test_a_shared_function_is_seen(tmp_path):
    fault = "#include <algorithm>\nint some_isa_largest(int a, int b) { return std::max(a, b); }\n"
    (found,) = symbols_not_of("some_isa", tmp_path, fault)
    assert "std::max" in found


def test_all_units_are_compiled_for_each_instruction_set():
    listed = re.search(r"foreach\(family IN ITEMS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert sorted(listed.split()) == UNITS

"""Compiles csrc/ with its CUDA kernels as code for the CPU (device.h, runtime.cpp), into build/emulated: a package gsa_ext beside the one of the checkout.

A .cu file is preprocessed; what is csrc's own in the result is translated: asm statements by the table INSTRUCTIONS, declarations of __shared__ variables,
launches. All else is C++ as it stands. An asm statement that is not in the table is an error. Objects are kept by the hash of all that goes into them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


class NotPossible(Exception):
    """This machine lacks something that the emulation needs."""


class Unknown(Exception):
    """Something in a CUDA source that there is no translation for."""


# ------------------------------------------------------------------------------------------------------------ asm statements

# The whole text of an asm statement, white space made one -> what takes its place; %0, %1 .. are the operands in either.
INSTRUCTIONS = {
    "": "static_cast<void>(0)",
    "mov.b32 %0, %1;": "%0 = %1",
    "cvt.rna.tf32.f32 %0, %1;": "%0 = emulation::to_tf32(%1)",
    "ex2.approx.ftz.f32 %0, %1;": "%0 = emulation::exp2_ftz(%1)",
    "rcp.approx.ftz.f32 %0, %1;": "%0 = 1.f / %1",
    # memory
    "ld.shared.b32 %0, [%1 + %2];": "%0 = *static_cast<const uint32_t*>(emulation::at(%1 + %2, 4))",
    "ld.shared.v2.f32 {%0, %1}, [%2];": "emulation::load_two(&%0, &%1, %2)",
    "st.shared.b32 [%0], %1; st.shared.b32 [%0 + %3], %2;": "*static_cast<uint32_t*>(emulation::at(%0, 4)) = %1, "
    "*static_cast<uint32_t*>(emulation::at(%0 + %3, 4)) = %2",
    "atom.shared.add.u32 %0, [%1], %2;": "%0 = (*static_cast<uint32_t*>(emulation::at(%1, 4)) += %2) - %2",
    "{ .reg .pred valid; setp.ne.u32 valid, %2, 0; mov.u32 %0, 0; @valid ld.global.nc.b32 %0, [%1]; }": "%0 = %2 ? *reinterpret_cast<const uint32_t*>(%1) : 0u",
    "red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};": "emulation::add_four(%0, %1, %2, %3, %4)",
    "red.release.gpu.global.add.u32 [%0], 1;": "++*%0",
    "ld.acquire.gpu.global.u32 %0, [%1];": "%0 = *%1",
    "prefetch.global.L2 [%0];": "static_cast<void>(0)",
    "cp.async.bulk.prefetch.L2.global [%0], %1;": "static_cast<void>(0)",
    "cp.async.ca.shared.global [%0], [%1], %2;": "emulation::copy_async(%0, %1, %2, %2)",
    "cp.async.ca.shared.global [%0], [%1], %2, %3;": "emulation::copy_async(%0, %1, %2, %3)",
    "cp.async.cg.shared.global [%0], [%1], 16;": "emulation::copy_async(%0, %1, 16, 16)",
    "cp.async.cg.shared.global [%0], [%1], 16, %2;": "emulation::copy_async(%0, %1, 16, %2)",
    "cp.async.commit_group;": "emulation::copy_commit()",
    "cp.async.wait_group %0;": "emulation::copy_wait(%0)",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];": "emulation::bulk_load(%0, %1, %2, %3)",
    "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;": "emulation::bulk_store(%0, %1, %2)",
    "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];": "emulation::tensor_load("
    "%0, %1, {%2, %3, %4, %5}, %6)",
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];": "emulation::tensor_load(%0, %1, {%2, %3}, %4)",
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];": "emulation::tensor_store(%0, {%1, %2}, %3)",
    "cp.async.bulk.commit_group;": "emulation::bulk_commit()",
    "cp.async.bulk.wait_group 0;": "emulation::bulk_wait(false)",
    "cp.async.bulk.wait_group.read 0;": "emulation::bulk_wait(true)",
    # kernels follow each other
    "griddepcontrol.wait;": "static_cast<void>(0)",
    "griddepcontrol.launch_dependents;": "static_cast<void>(0)",
    # barriers
    "bar.sync %0, %1;": "emulation::sync(%0, %1)",
    "fence.proxy.async.shared::cta;": "static_cast<void>(0)",
    "fence.mbarrier_init.release.cluster;": "static_cast<void>(0)",
    "mbarrier.init.shared::cta.b64 [%0], 1;": "emulation::mbarrier_init(%0, 1)",
    "mbarrier.init.shared::cta.b64 [%0], %1;": "emulation::mbarrier_init(%0, %1)",
    "mbarrier.arrive.shared::cta.b64 _, [%0];": "emulation::mbarrier_arrive(%0)",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": "emulation::mbarrier_expect(%0, %1)",
    "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }": "emulation::mbarrier_wait(%0, %1)",
    "{ .reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1; @!done bra again; }": "emulation::"
    "mbarrier_wait(%0, %1)",
    "barrier.cluster.arrive.release;": "emulation::cluster_arrive()",
    "barrier.cluster.arrive.relaxed;": "emulation::cluster_arrive()",
    "barrier.cluster.wait.acquire;": "emulation::cluster_wait()",
    "{ .reg .b32 data, barrier; mapa.shared::cluster.u32 data, %0, %3; mapa.shared::cluster.u32 barrier, %1, %3; "
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [data], %2, [barrier]; }": "emulation::store_async("
    "emulation::mapa(%0, %3), %2, emulation::mapa(%1, %3))",
    "mapa.shared::cluster.u32 %0, %1, %2;": "%0 = emulation::mapa(%1, %2)",
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];": "emulation::store_four_async(%0, %1, %2, %3, %4, %5)",
    "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];": "emulation::mbarrier_arrive_there(%0)",
    "setmaxnreg.dec.sync.aligned.u32 %0;": "static_cast<void>(0)",
    "setmaxnreg.inc.sync.aligned.u32 %0;": "static_cast<void>(0)",
    # matrices
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];": "emulation::load_matrix(false, &%0, &%3, %4)",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];": "emulation::load_matrix(true, &%0, &%3, %4)",
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};": "emulation::store_matrix(false, %0, %1, %2, %3, %4)",
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};": "emulation::store_matrix(true, %0, %1, %2, %3, %4)",
    "wgmma.fence.sync.aligned;": "emulation::wgmma_fence()",
    "wgmma.commit_group.sync.aligned;": "emulation::wgmma_commit()",
    "wgmma.wait_group.sync.aligned %0;": "emulation::wgmma_wait(%0)",
}
for _kind, _type in (("Bf16", "bf16"), ("F16", "f16")):
    INSTRUCTIONS[f"mma.sync.aligned.m16n8k16.row.col.f32.{_type}.{_type}.f32 {{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};"] = (
        f"emulation::mma(emulation::k{_kind}, &%0, &%3, %4, %5, %6, %7, %8, %9)"
    )
    for _n in (16, 32, 64, 128):
        _r, _instruction = _n // 2, f"wgmma.mma_async.sync.aligned.m64n{_n}k16.f32.{_type}.{_type} {{{', '.join(f'%{i}' for i in range(_n // 2))}}}, "
        _first = f"emulation::k{_kind}, {_n}, &%0, &%{_r - 1}, "
        INSTRUCTIONS[f"{{ .reg .pred p; setp.ne.b32 p, %{_r + 2}, 0; {_instruction}%{_r}, %{_r + 1}, p, 1, 1, %{_r + 3}, %{_r + 4}; }}"] = (
            f"emulation::wgmma_ss({_first}%{_r}, %{_r + 1}, %{_r + 2}, %{_r + 3}, %{_r + 4})"
        )
        INSTRUCTIONS[f"{_instruction}{{%{_r}, %{_r + 1}, %{_r + 2}, %{_r + 3}}}, %{_r + 4}, 1, 1, 1, %{_r + 5};"] = (
            f"emulation::wgmma_rs({_first}%{_r}, %{_r + 1}, %{_r + 2}, %{_r + 3}, %{_r + 4}, %{_r + 5})"
        )
INSTRUCTIONS["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"] = (
    "emulation::mma(emulation::kTf32, &%0, &%3, %4, %5, %6, %7, %8, %9)"
)


def _spaced(ptx: str) -> str:
    """PTX with one space where there was any white space, none after `{` of registers or before a comma."""
    return re.sub(r"\s+", " ", ptx).strip()


def _no_space(ptx: str) -> str:
    return re.sub(r"\s*([,;{}\[\]])\s*", r"\1", _spaced(ptx))


_TABLE = {_no_space(ptx): code for ptx, code in INSTRUCTIONS.items()}


def closing(text: str, at: int) -> int:
    """The place behind what closes the bracket that ends before `at`."""
    depth = 1
    while depth:
        c = text[at]
        if c in "\"'":
            at = _literal_end(text, at)
            continue
        depth += (c in "([{") - (c in ")]}")
        at += 1
    return at


def _literal_end(text: str, at: int) -> int:
    quote, at = text[at], at + 1
    while text[at] != quote:
        at += 2 if text[at] == "\\" else 1
    return at + 1


def split(text: str, separator: str) -> list[str]:
    """Parts of a text between separators that are not in brackets or literals."""
    parts, start, at = [], 0, 0
    while at < len(text):
        c = text[at]
        if c in "\"'":
            at = _literal_end(text, at)
        elif c in "([{":
            at = closing(text, at + 1)
        else:
            if c == separator:
                parts.append(text[start:at])
                start = at + 1
            at += 1
    return [*parts, text[start:]]


def translate_asm(inside: str) -> str:
    """An expression for asm(inside)."""
    template, *sections = split(re.sub(r"(?m)^# \d+ .*$", "", inside), ":")
    ptx = "".join(part.encode().decode("unicode_escape") for part in re.findall(r'"((?:[^"\\]|\\.)*)"', template))
    if (code := _TABLE.get(_no_space(ptx))) is None:
        raise Unknown(f"an asm statement that the emulation does not know; tests/emulation/build.py, INSTRUCTIONS:\n    {_spaced(ptx)}")
    operands = []
    for section in sections[:2]:
        for operand in split(section, ","):
            if operand.strip():
                constraint = re.match(r'\s*(?:\[\w+\]\s*)?"[^"]*"\s*\(', operand)
                if constraint is None:
                    raise Unknown(f"an operand of an asm statement: {operand}")
                operands.append("(" + operand[constraint.end() : operand.rindex(")")] + ")")
    numbers = {int(n) for n in re.findall(r"%(\d+)", code)}
    if numbers and max(numbers) >= len(operands):
        raise Unknown(f"{len(operands)} operands for {_spaced(ptx)}")
    return "(" + re.sub(r"%(\d+)|\bemulation::", lambda m: operands[int(m[1])] if m[1] else "::emulation::", code) + ")"


# ------------------------------------------------------------------------------------------------------------ a source


def translate(text: str) -> str:
    """Preprocessed CUDA code as C++."""
    out, at = [], 0
    for m in re.finditer(r"\b(?:asm|__asm__)\s*(?:volatile\s*|__volatile__\s*)?\(", text):
        if m.start() >= at:
            end = closing(text, m.end())
            out += [text[at : m.start()], translate_asm(text[m.end() : end - 1])]
            at = end
    text = "".join(out) + text[at:]

    out, at = [], 0
    for m in re.finditer(r"\b(\w+)\s*<<<", text):
        end = text.index(">>>", m.end())
        call = re.compile(r"\s*\(").match(text, end + 3)
        if call is None:
            raise Unknown(f"a launch: {text[m.start() : end + 20]}")
        last = closing(text, call.end())
        out += [text[at : m.start()], f"::emulation::Launch({text[m.end() : end]}).of({m[1]}, {text[call.end() : last]}"]
        at = last
    text = "".join(out) + text[at:]

    text = re.sub(
        r"\bextern\s+emulation_shared\s+(?:alignas\s*\(\s*(\d+)\s*\)\s*)?([\w:]+)\s+(\w+)\s*\[\s*\]\s*;",
        lambda m: f"{m[2]}* const {m[3]} = static_cast<{m[2]}*>(::emulation::dynamic_shared({m[1] or 16}));",
        text,
    )
    text = re.sub(
        r"\bemulation_shared\s+(?:alignas\s*\(\s*(\d+)\s*\)\s*)?([\w:]+)\s+(\w+)\s*((?:\[[^\];]*\]\s*)*);",
        lambda m: (
            f"auto& {m[3]} = *[] {{ static char key; using Type = {m[2]}{m[4]}; "
            f"return static_cast<Type*>(::emulation::static_shared(&key, sizeof(Type), {m[1] or 'alignof(Type)'})); }}();"
        ),
        text,
    )
    if left := re.search(r".*\bemulation_shared\b.*", text):
        raise Unknown(f"a declaration of shared memory: {left[0]}")
    return text


def translate_own(text: str) -> str:
    """The same, of the parts that come from files of this project: headers of others may have asm statements of their own."""
    runs: list[tuple[bool, list[str]]] = []
    own = False
    for line in text.split("\n"):
        if m := re.match(r'# \d+ "([^"]+)"', line):
            own = Path(m[1]).is_relative_to(CSRC) or m[1] == str(HERE / "faults.cu")
        if not runs or runs[-1][0] != own:
            runs.append((own, []))
        runs[-1][1].append(line)
    return "\n".join(translate("\n".join(lines)) if own else "\n".join(lines) for own, lines in runs)


# ------------------------------------------------------------------------------------------------------------ a build


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def execute(command: Sequence[object]) -> str:
    run = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{run.stderr[:8000]}")
    return run.stdout


def cuda_headers() -> Path:
    """Of a toolkit, or those that come along with torch."""
    places = [Path(home) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))] + [Path("/usr/local/cuda/include")]
    places += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include"))
    for place in places:
        if all((place / name).exists() for name in ("cuda.h", "cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "crt/host_defines.h")):
            return place
    raise NotPossible("no headers of CUDA: neither a toolkit, nor those that come along with a torch for CUDA")


TORCH_HEADERS = """#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
"""


class Builder:
    """asan: with AddressSanitizer, which sees accesses beyond the end of a tensor."""

    def __init__(self, asan: bool = False) -> None:
        if platform.machine() != "x86_64" or platform.system() != "Linux" or shutil.which("g++") is None:
            raise NotPossible("the emulation needs Linux on x86-64 and g++")
        self.out = ROOT / "build" / ("emulated-asan" if asan else "emulated")
        self.package = self.out / "package"
        self.cuda = cuda_headers()
        self.common = ["-std=c++20", "-fPIC", "-w", "-g0", "-fvisibility=hidden", *(["-fsanitize=address", "-fno-omit-frame-pointer"] if asan else [])]
        self.extra = ["-fsanitize=address"] if asan else []
        # -g1, no sibling calls: the runtime says where in the source lanes have parted
        self.device = [*self.common, "-g1", "-O1" if asan else "-O2", "-march=native", "-ffp-contract=fast", "-fno-optimize-sibling-calls"]
        cpu = re.search(r"flags\s*:.*", Path("/proc/cpuinfo").read_text())
        self.machine = digest(execute(["g++", "--version"]), cpu[0] if cpu else "", self.cuda)

    def _object(self, name: str, key: str, compile: Callable[[Path], object]) -> Path:
        """The object of that key; older ones of that name go."""
        path = self.out / "objects" / f"{name}.{key[:16]}.o"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            new = path.with_suffix(f".{os.getpid()}.new")
            compile(new)
            for old in path.parent.glob(f"{name}.*.o"):
                old.unlink()
            new.rename(path)
            print(f"emulation: {name}, {time.monotonic() - started:.0f} s", flush=True)
        return path

    def kernels(self, source: Path) -> Path:
        """A .cu file."""
        flags = [f"-I{CSRC}", f"-I{self.cuda}", '-DGSA_BUILT_ARCHS="8.0 9.0a"']
        text = execute(["g++", "-E", "-x", "c++", *self.device, "-include", HERE / "device.h", *flags, source])
        try:
            text = translate_own(text)
        except Unknown as error:
            raise SystemExit(f"{source}: {error}") from None

        def compile(to: Path) -> None:
            translated = to.with_suffix(".ii")
            translated.write_text(text)
            execute(["g++", "-fpreprocessed", "-x", "c++", *self.device, "-c", translated, "-o", to])
            translated.unlink()

        return self._object(source.name, digest(text, self.device, self.machine), compile)

    def runtime(self) -> Path:
        flags = [*self.device, "-O3", f"-I{self.cuda}"]
        key = digest((HERE / "runtime.cpp").read_text(), (HERE / "device.h").read_text(), flags, self.machine)
        return self._object("runtime.cpp", key, lambda to: execute(["g++", *flags, "-c", HERE / "runtime.cpp", "-o", to]))

    def library(self) -> Path:
        """gsa_ext._C, in a package of symbolic links to the checkout's."""
        import torch
        from torch.utils import cpp_extension

        to = self.package / "gsa_ext" / f"_C{SUFFIX}"
        files = sorted([*CSRC.rglob("*.*"), *HERE.glob("*.h"), *HERE.glob("*.cpp"), HERE / "build.py"])
        everything = digest(*(f"{path}\n{path.read_text()}" for path in files if path.is_file()), torch.__version__, SUFFIX, self.machine, self.device)
        stamp = self.out / "stamp"
        if not (to.exists() and stamp.exists() and stamp.read_text() == everything):
            facts = {"TORCH": torch.__version__, "CUDA": torch.version.cuda or "", "ARCHS": "8.0 9.0a", "WHY": "kernels emulated"}
            flags = [*self.common, "-O1", "-fopenmp", "-DGSA_WITH_CUDA", *(f'-DGSA_BUILT_{name}="{fact}"' for name, fact in facts.items())]
            flags += [f"-I{path}" for path in (self.out, CSRC, *cpp_extension.include_paths(), sysconfig.get_path("include"))] + ["-DTORCH_EXTENSION_NAME=_C"]
            self.out.mkdir(parents=True, exist_ok=True)
            headers = self.out / "torch_headers.h"
            key = digest(TORCH_HEADERS, flags, self.machine)
            if not headers.exists() or TORCH_HEADERS != headers.read_text():
                headers.write_text(TORCH_HEADERS)
            own_headers = digest(*(path.read_text() for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("cpu/*.h"), HERE / "op_layer.h"])), key)

            def host(source: Path) -> Path:
                includes = ["-include", headers] if source.parent == CSRC else []
                if source.name in ("ops.cpp", "beside.cpp", "inputs.cpp"):
                    includes += ["-include", HERE / "op_layer.h"]
                command = ["g++", *flags, *includes, "-c", source, "-o"]
                return self._object(source.name, digest(source.read_text(), own_headers, command), lambda to: execute([*command, to]))

            def precompiled() -> None:
                gch = self._object("torch_headers.h", key, lambda to: execute(["g++", *flags, "-x", "c++-header", headers, "-o", to]))
                link = headers.with_suffix(".h.gch")
                link.unlink(missing_ok=True)
                link.hardlink_to(gch)

            cuda = sorted(CSRC.glob("cuda/*.cu"), key=lambda path: (-path.stat().st_size, path))
            hosts = [*sorted(CSRC.glob("*.cpp")), CSRC / "cpu" / "cpu.cpp", CSRC / "cpu" / "baseline.cpp", HERE / "fp64.cpp"]
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                first = pool.submit(precompiled)
                objects = [pool.submit(self.kernels, path) for path in cuda] + [pool.submit(self.runtime)]
                first.result()
                objects += [pool.submit(host, path) for path in hosts]
                paths = [each.result() for each in objects]
            to.parent.mkdir(parents=True, exist_ok=True)
            new = to.with_suffix(f".{os.getpid()}")
            lib = Path(torch.__file__).parent / "lib"
            execute(
                ["g++", "-shared", *self.extra, *paths, f"-L{lib}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-Wl,-Bsymbolic", "-ldl", "-o", new]
            )
            new.rename(to)
            stamp.write_text(everything)
        for path in (ROOT / "gsa_ext").iterdir():
            link = to.parent / path.name
            if path.suffix != ".so" and path.name != "__pycache__" and not link.is_symlink():
                link.symlink_to(path)
        for link in to.parent.iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink()
        return to

    def faults(self) -> Path:
        """The kernels of faults.cu, which have faults, as a library of their own."""
        objects = [self.kernels(HERE / "faults.cu"), self.runtime()]
        to = self.out / "objects" / f"faults.{digest(*objects)[:16]}.so"
        if not to.exists():
            execute(["g++", "-shared", *self.extra, *objects, "-Wl,-Bsymbolic", "-ldl", "-o", to])
        return to

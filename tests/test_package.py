"""The package around the ops: import, refusal on another torch, the command line, the build's decisions."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gsa_ext
from gsa_ext import _load, cli

ROOT = Path(__file__).resolve().parent.parent


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, cwd=Path(__file__).parent)


def test_a_transformers_that_is_too_new():
    pytest.importorskip("transformers")
    done = python("import transformers; transformers.__version__ = '5.25.0'; import gsa_ext.hf")
    assert done.returncode and done.stderr.endswith("gsa_ext.hf works with transformers 5.17 to 5.24, found 5.25.0: pip install 'transformers<5.25'\n")


def test_built_for_this_torch():
    build = _load.built()
    assert build.torch.partition("+")[0] == torch.__version__.partition("+")[0] and build.path.exists()
    assert _load.mismatch(build, torch.__version__, torch.version.cuda) is None
    assert _load.library().built.split(";")[1] == f"torch={build.torch}"
    assert build.cuda is None or {a.partition("+")[0] for a in build.archs}


@pytest.mark.parametrize(
    "have,cuda,want",
    [
        ("1.0.0", torch.version.cuda, r"built for torch \S+, found torch 1\.0\.0: reinstall with `pip install --force-reinstall .*`"),
        (torch.__version__ + "1", torch.version.cuda, r"built for torch"),
    ],
)
def test_another_torch(have, cuda, want):
    build = _load.built()._replace(torch="2.11.0")
    sentence = _load.mismatch(build, have, cuda)
    assert sentence is None if have.partition("+")[0] == "2.11.0" else re.search(want, sentence)


def test_another_cuda():
    build = _load.Build("2.11.0+cu130", "13.0", ("8.0",), Path("x"))
    assert _load.mismatch(build, "2.11.0", "13.2") is None
    assert "with CUDA 13.0, found torch 2.11.0+cu126 with CUDA 12.6:" in _load.mismatch(build, "2.11.0+cu126", "12.6")
    assert "found torch 2.11.0+cpu without CUDA:" in _load.mismatch(build, "2.11.0+cpu", None)
    assert _load.mismatch(build._replace(cuda=None), "2.11.0+cu126", "12.6") is None


def test_import_answers_another_torch_with_a_sentence():
    """One ImportError with one sentence, before anything native is loaded."""
    done = python("import torch; torch.__version__ = '2.99.0'; import gsa_ext")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: gsa_ext was built for torch ") and "found torch 2.99.0: reinstall with `pip install --force-reinstall" in last


def test_import_needs_torch_alone():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('transformers', 'datasets', 'accelerate', 'matplotlib', 'safetensors', 'tqdm'):
            raise ImportError('not here: ' + name)
sys.meta_path.insert(0, Refuse())
import torch, gsa_ext
x = gsa_ext.testing = __import__('gsa_ext.testing', fromlist=['x'])
o, _ = gsa_ext.chunk_gsa(**x.make_inputs(T=5))
layer = gsa_ext.GatedSlotAttention(hidden_size=32, num_heads=2, num_slots=4)
print(tuple(o.shape), gsa_ext.cli.main(['info']) if hasattr(gsa_ext, 'cli') else __import__('gsa_ext.cli', fromlist=['x']).main(['info']))
"""
    done = python(code)
    assert done.returncode == 0 and "(1, 5, 2, 64) 0" in done.stdout, done.stderr


def test_import_without_a_gpu():
    done = python("import gsa_ext; print(gsa_ext.__version__)", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and done.stdout.strip() == gsa_ext.__version__, done.stderr


def test_stub_says_what_is_there():
    library, stub = _load.library(), (Path(gsa_ext.__file__).parent / "_C.pyi").read_text()
    assert {name for name in dir(library) if not name.startswith("_")} == {"built", "compiler", "set_checks", "checks", "short_way"}
    assert all(name in stub for name in ("built: str", "compiler: str", "def set_checks(", "def checks(", "def short_way("))
    assert (Path(gsa_ext.__file__).parent / "py.typed").exists()


def test_set_checks():
    library = _load.library()
    assert library.checks() is False
    gsa_ext.set_checks(True)
    assert library.checks() is True
    gsa_ext.set_checks(False)
    assert library.checks() is False


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and gsa_ext.__version__ in text and ("CPU only" in text or _load.built().cuda in text)


def test_verify(capsys, device):
    assert cli.main(["verify", "--device", device.type]) == 0
    assert "verify: pass" in capsys.readouterr().out


def test_verify_says_what_is_off(capsys, monkeypatch):
    """With an op that is wrong by a little, the exit status is 1 and the output names the tensor and by how much."""
    right = gsa_ext.chunk_gsa

    def chunk_gsa(**x):
        o, final = right(**x)
        return o * 1.01, final

    monkeypatch.setattr(gsa_ext, "chunk_gsa", chunk_gsa)
    assert cli.main(["verify", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "chunk_gsa" in text and "o  error 1.0" in text and "OFF BY" in text and "tensors OFF" in text


def test_bench(capsys):
    assert cli.main(["bench", "--device", "cpu", "--tokens", "64", "--heads", "2", "1", "--dim", "16", "--slots", "8"]) == 0
    assert "GSA fwd+bwd" in capsys.readouterr().out


def test_a_build_without_cuda_is_said_aloud(capsys, monkeypatch):
    build = _load.built()
    assert build.cuda or build.why
    for cuda, why, said in ((None, "no nvcc", "gsa-ext: built for the CPU ONLY (no nvcc)\n"), ("13.0", "", "")):
        monkeypatch.setattr(_load, "built", lambda cuda=cuda, why=why: build._replace(cuda=cuda, why=why))
        assert cli.main(["bench", "--device", "cpu", "--tokens", "16", "--heads", "1", "1", "--dim", "8", "--slots", "4"]) == 0
        assert capsys.readouterr().err == said


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, with nothing set up."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not in a source tree")
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.delenv("GSA_BUILD_CUDA", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    return runpy.run_path(str(ROOT / "setup.py"))


def test_cuda_is_built_where_torch_and_toolkit_agree(build, monkeypatch):
    use_cuda = build["use_cuda"]
    assert use_cuda("13.2", "13.0")[0]
    refused = ("13.0", "12.8", "major versions must agree"), ("13.0", None, "put nvcc 13.x on PATH"), (None, "13.0", "this torch has no CUDA")
    for torch_cuda, toolkit, why in refused:
        decided, reason = use_cuda(torch_cuda, toolkit)
        assert not decided and why in reason
        monkeypatch.setenv("GSA_BUILD_CUDA", "1")
        with pytest.raises(SystemExit, match=f"GSA_BUILD_CUDA=1 cannot be done: .*{why}"):
            use_cuda(torch_cuda, toolkit)
        monkeypatch.delenv("GSA_BUILD_CUDA")
    monkeypatch.setenv("GSA_BUILD_CUDA", "0")
    assert not use_cuda("13.0", "13.0")[0]
    monkeypatch.setenv("GSA_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="GSA_BUILD_CUDA: expected 0 or 1, given 'yes'"):
        use_cuda("13.0", "13.0")


def test_an_isolated_build_asks_for_the_torch_that_is_here(build):
    assert build["build_requirements"]() == ["ninja", f"torch=={torch.__version__.partition('+')[0]}"]


def test_a_build_without_torch_says_what_to_install(build, monkeypatch):
    from setuptools import Distribution

    monkeypatch.setitem(sys.modules, "torch", None)
    command = build["native"]()["cmdclass"]["build_ext"](Distribution())
    with pytest.raises(SystemExit, match="pip install torch setuptools ninja"):
        command.run()


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="not in a source tree")
def test_readme_examples_run():
    """Those that need no download, one after the other, as a reader would type them."""
    blocks = [b.partition("```")[0] for b in (ROOT / "README.md").read_text().split("```python\n")[1:]]
    scope = {}
    for block in blocks:
        if "from_pretrained" not in block:
            exec(compile(block, "README.md", "exec"), scope)
    assert scope["o"].shape == (2, 8, 64) and scope["y"].shape == (2, 100, 512)

"""What is not needed is not imported: neither by `import mechmem` nor by the help of a command."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "pandas", "transformer_lens", "plotly", "numpy", "scipy", "safetensors")


def loaded(code: str) -> set[str]:
    """Which of the heavy packages a fresh process has imported after this code."""
    program = (
        f"import sys\n{code}\nprint('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(ran.stdout.splitlines()[-1].split()[1:])


def helped(*arguments: str) -> str:
    call = "try:\n    main()\nexcept SystemExit:\n    pass"
    return f"sys.argv = {['mechmem', *arguments]}\nfrom mechmem.cli.main import main\n{call}"


@pytest.mark.parametrize(
    "arguments", [("--help",), ("run", "--help"), ("train", "--help"), ("nonsense",)]
)
def test_help_imports_nothing_heavy(arguments):
    assert loaded(helped(*arguments)) == set()


def test_importing_the_package_imports_nothing_heavy():
    assert loaded("import mechmem\ndir(mechmem)") == set()


def test_a_name_imports_what_it_needs():
    """The other tests would pass for a package that does nothing at all."""
    found = loaded("import mechmem as mm\nmm.Patch")
    assert "torch" in found
    assert "plotly" not in found


def test_figures_import_no_torch():
    assert "torch" not in loaded("import mechmem.report.figures")


def test_describing_a_model_imports_no_transformer_lens():
    assert "transformer_lens" not in loaded("import mechmem as mm\nmm.Architecture(n_layers=3)")

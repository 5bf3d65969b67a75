"""``python -m fastlip.study``."""

import os

#: Environment variables of the libraries that torch loads, which read them once, as they are loaded.
_ENVIRONMENT = {
    # Threads of OpenMP that wait for work sleep instead of spinning, which took half of the CPU time where other
    # processes keep the cores busy. Both runtimes that torch is built with hear of it; results are the same.
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
    # Without it cuBLAS may choose other algorithms from run to run.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def main() -> None:
    """Run the command line, or say which package is missing."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from fastlip.study import cli

        cli.main()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fastlip":
            raise
        raise SystemExit(f'error: the study needs {error.name}: pip install "fastlip[study]"') from None


if __name__ == "__main__":
    main()

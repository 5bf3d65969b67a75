"""``python -m fastlip.study``."""


def main() -> None:
    """Run the command line, or say which package is missing."""
    try:
        from fastlip.study import cli

        cli.main()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fastlip":
            raise
        raise SystemExit(f'error: the study needs {error.name}: pip install "fastlip[study]"') from None


if __name__ == "__main__":
    main()

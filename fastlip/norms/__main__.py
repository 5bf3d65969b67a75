"""``python -m fastlip.norms resnet50 --input 3,32,32`` prints the operator norms of a model's layers."""

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError:
    raise SystemExit('error: python -m fastlip.norms needs typer and rich: pip install "fastlip[study]"') from None

from fastlip.norms._cli import app

if __name__ == "__main__":
    app(prog_name="python -m fastlip.norms")

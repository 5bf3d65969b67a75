"""What every test sees: one thread, and the devices at hand."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    import fastlip

    return str(fastlip.build_info())

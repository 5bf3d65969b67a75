"""``python -m fastlip`` prints what is installed and in use."""

from fastlip import build_info

if __name__ == "__main__":
    print(build_info())

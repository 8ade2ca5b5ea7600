"""``python -m torchmto`` is the command ``torchmto``."""

from torchmto.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

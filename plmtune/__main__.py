"""``python -m plmtune``, and what ``torchrun -m plmtune`` starts."""

from plmtune.cli import main

if __name__ == "__main__":
    main()

"""``python -m gradbits`` is the ``gradbits`` command."""

from gradbits.cli import main

if __name__ == "__main__":
    main()

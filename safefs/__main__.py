"""`python -m safefs`."""

from safefs.cli.main import main

if __name__ == "__main__":
    main()

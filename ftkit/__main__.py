"""`python -m ftkit`, the same as the `ftkit` command."""

from ftkit.cli import main

if __name__ == "__main__":
    main()

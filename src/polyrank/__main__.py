"""`python -m polyrank`: the command line."""

from polyrank.cli import main

if __name__ == "__main__":
    main()

"""`python -m flagscale_like`: the command line, also what torchrun starts on every rank."""

from flagscale_like.cli import main

if __name__ == "__main__":
    main()

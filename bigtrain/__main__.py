"""`python -m bigtrain` is the `bigtrain` command."""

from bigtrain.cli import main

if __name__ == "__main__":
    main()

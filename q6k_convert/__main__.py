"""Entry point of `python -m q6k_convert`, the same as `q6k-convert`."""

from q6k_convert.cli.main import main

if __name__ == "__main__":
    main()

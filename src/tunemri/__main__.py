"""`python -m tunemri` is `tunemri`."""

from .cli import main

if __name__ == "__main__":
    main()

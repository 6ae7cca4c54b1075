"""`python -m tunemri` is `tunemri`."""

if __name__ == "__main__":
    try:
        from .cli import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    main()
